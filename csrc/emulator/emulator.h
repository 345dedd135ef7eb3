// Runs CUDA kernels on the CPU from their own source, for tests.
//
// One fiber per thread, blocks one after another. Barriers count their arrivals per warp and per
// block, so a barrier that some threads never reach ends the program with a message. Shared memory
// is a fresh allocation per block, exactly as large as declared and filled with NaN, so that
// AddressSanitizer sees an overrun and the results show a read before the write. Copies to shared
// memory arrive only when they are waited for. Both orders of threads (`reversed`) and new data
// each time show a missing barrier. What it cannot show: races inside one order, and speed.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define HYPERINF_SHARED(Type, name) Type& name = emu::shared_memory<Type>()

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

constexpr unsigned kWarp = 32, kStack = 128 << 10;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
  std::vector<std::vector<Copy>>
      groups;  // committed copies that were not waited for, and open ones
};
struct Barrier {
  unsigned arrived = 0, generation = 0;
};

inline bool reversed = false;
inline unsigned first_block = 0, last_block = ~0u;  // only these run, of a grid of any size
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned current;
inline bool moved;
inline std::vector<Fiber> fibers;
inline std::vector<Barrier> warps;
inline Barrier block;
inline std::vector<double> slots;         // what a warp exchanges, one per thread
inline std::vector<const void*> objects;  // the same for fragments
inline std::unique_ptr<char, void (*)(void*)> shared{nullptr, std::free};

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", message, blockIdx.x, current);
  std::_Exit(3);
}

template <class T>
T& shared_memory() {
  if (!shared) {
    void* memory = nullptr;
    if (posix_memalign(&memory, alignof(T) < 16 ? 16 : alignof(T), sizeof(T)) != 0)
      fail("no memory");
    shared.reset(static_cast<char*>(std::memset(memory, 0xff, sizeof(T))));
  }
  return *reinterpret_cast<T*>(shared.get());
}

inline void yield() {
  const unsigned me = current;
  const dim3 thread = threadIdx;
  swapcontext(&fibers[me].context, &scheduler);
  threadIdx = thread;
}

inline void entry() {
  body();
  fibers[current].done = moved = true;
  swapcontext(&fibers[current].context, &scheduler);
}

// A barrier over the live fibers from first to last - 1.
inline void wait(Barrier& barrier, unsigned first, unsigned last) {
  const unsigned generation = barrier.generation;
  ++barrier.arrived;
  moved = true;
  while (barrier.generation == generation) {
    unsigned live = 0;
    for (unsigned i = first; i < last; ++i) live += !fibers[i].done;
    if (barrier.arrived < live) {
      yield();
      continue;
    }
    barrier.arrived = 0;
    ++barrier.generation;
    moved = true;
  }
}

inline void warp_sync() {
  const unsigned first = current / kWarp * kWarp, count = static_cast<unsigned>(fibers.size());
  wait(warps[current / kWarp], first, first + kWarp < count ? first + kWarp : count);
}

inline void start(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = &scheduler;
  fiber.done = false;
  fiber.groups.assign(1, {});
  makecontext(&fiber.context, entry, 0);
}

template <class F>
void launch(unsigned grid, unsigned threads, F kernel) {
  gridDim = {grid}, blockDim = {threads};
  body = kernel;
  fibers.resize(threads);
  slots.assign(threads, 0);
  objects.assign(threads, nullptr);
  for (unsigned b = first_block; b < grid && b <= last_block; ++b) {
    blockIdx = {b};
    block = {};
    warps.assign(threads / kWarp + 1, {});
    shared.reset();
    for (Fiber& fiber : fibers) start(fiber);
    for (bool live = true; live;) {
      live = moved = false;
      for (unsigned i = 0; i < threads; ++i) {
        current = reversed ? threads - 1 - i : i;
        if (fibers[current].done) continue;
        live = true;
        threadIdx = {current, 0, 0};
        swapcontext(&scheduler, &fibers[current].context);
      }
      if (live && !moved) fail("threads wait at different barriers");
    }
  }
}

// The launcher that the kernels' own launch code is given.
struct Launch {
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), unsigned grid, unsigned threads,
                  Arguments... arguments) const {
    launch(grid, threads, [=] { kernel(arguments...); });
  }
};

}  // namespace emu

inline void __syncthreads() { emu::wait(emu::block, 0, static_cast<unsigned>(emu::fibers.size())); }

inline void __syncwarp() { emu::warp_sync(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  emu::slots[emu::current] = static_cast<double>(value);
  emu::warp_sync();
  const T other = static_cast<T>(emu::slots[emu::current ^ mask]);
  emu::warp_sync();
  return other;
}
