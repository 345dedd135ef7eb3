// Stands in for the toolkit's header: copies to shared memory arrive when they are waited for, and
// until then the target holds NaN.
#pragma once

#include "emulator.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 ||
      reinterpret_cast<uintptr_t>(from) % bytes != 0)
    emu::fail("an asynchronous copy is not aligned");
  std::memset(to, 0xff, bytes);
  emu::fibers[emu::current].groups.back().push_back({to, from, bytes});
}

inline void __pipeline_commit() { emu::fibers[emu::current].groups.emplace_back(); }

inline void __pipeline_wait_prior(size_t prior) {
  auto& groups = emu::fibers[emu::current].groups;
  while (groups.size() > prior + 1) {
    for (const emu::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}
