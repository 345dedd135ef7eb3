// Scratch memory, aligned for every vector width.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <memory>
#include <new>

namespace hyperinf {

constexpr std::align_val_t kVectorAlignment{64};

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, kVectorAlignment); }
};

template <class T>
std::unique_ptr<T[], FreeAligned> aligned(int64_t count) {
  void* p = ::operator new(static_cast<size_t>(count) * sizeof(T), kVectorAlignment, std::nothrow);
  STD_TORCH_CHECK(p != nullptr, "no memory for ", count, " numbers of scratch");
  return std::unique_ptr<T[], FreeAligned>(static_cast<T*>(p));
}

inline std::unique_ptr<float[], FreeAligned> aligned_floats(int64_t count) {
  return aligned<float>(count);
}

}  // namespace hyperinf
