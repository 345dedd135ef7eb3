// What the device kernels share: element types, strided operands, and slabs of them in shared
// memory. Nothing here knows torch; the emulator compiles the same text with its own CUDA headers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cstdint>

#ifndef HYPERINF_SHARED  // the emulator brings its own, with fences around it
#define HYPERINF_SHARED(Type, name) __shared__ Type name
#endif

namespace hyperinf::gpu {

__host__ __device__ constexpr int64_t parts(int64_t size, int64_t of) {
  return (size + of - 1) / of;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// A matrix read through its strides.
template <class T>
struct Operand {
  const T* data;
  int64_t row_stride, col_stride;
  int64_t rows, cols;
  bool wide;  // col_stride is 1 and every row starts at a multiple of 16 bytes
};

template <class T>
bool is_wide(const T* data, int64_t row_stride, int64_t col_stride, int64_t outer_stride) {
  constexpr int64_t bytes = sizeof(T);
  return col_stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         row_stride * bytes % 16 == 0 && outer_stride * bytes % 16 == 0;
}

// Elements from one row of a slab to the next: 16 bytes more than a row, against bank conflicts.
template <class T>
__host__ __device__ constexpr int pitch(int cols) {
  return cols + 16 / static_cast<int>(sizeof(T));
}

// Starts the copy of ROWS x COLS elements at (row0, col0); what lies outside of x becomes zero.
template <int ROWS, int COLS, int THREADS, class T>
__device__ void load_slab(T* slab, const Operand<T>& x, int64_t row0, int64_t col0) {
  constexpr int vector = 16 / sizeof(T), chunks = COLS / vector;
  const int thread = static_cast<int>(threadIdx.x);
  if (x.wide) {
    for (int k = thread; k < ROWS * chunks; k += THREADS) {
      const int row = k / chunks, col = k % chunks * vector;
      const int64_t left = row0 + row < x.rows ? x.cols - col0 - col : 0;
      const T* from = x.data + (row0 + row) * x.row_stride + col0 + col;
      T* to = slab + row * pitch<T>(COLS) + col;
      if (left >= vector)
        __pipeline_memcpy_async(to, from, 16);
      else
        for (int e = 0; e < vector; ++e) to[e] = e < left ? from[e] : T(0.0f);
    }
    return;
  }
  for (int k = thread; k < ROWS * COLS; k += THREADS) {
    const int64_t row = row0 + k / COLS, col = col0 + k % COLS;
    const bool inside = row < x.rows && col < x.cols;
    slab[k / COLS * pitch<T>(COLS) + k % COLS] =
        inside ? x.data[row * x.row_stride + col * x.col_stride] : T(0.0f);
  }
}

// Sum over the block in a fixed order; the total is thread 0's. `warps` holds one value per warp.
template <int THREADS>
__device__ float block_sum(float value, float* warps) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread % 32 == 0) warps[thread / 32] = value;
  __syncthreads();
  float total = 0;
  if (thread == 0)
    for (int k = 0; k < THREADS / 32; ++k) total += warps[k];
  __syncthreads();
  return total;
}

// out[row] = sum of partial (rows, count) over its row, in fp64 and in a fixed order: a warp a row.
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    sum_partials_kernel(const float* partial, float* out, int64_t rows, int64_t count, bool clamp) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  constexpr int warps = THREADS / 32;
  for (int64_t row = int64_t{blockIdx.x} * warps + warp; row < rows;
       row += int64_t{gridDim.x} * warps) {
    double total = 0;
    for (int64_t k = lane; k < count; k += 32)
      total += static_cast<double>(partial[row * count + k]);
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    // cancellation can leave a sum of squares slightly below zero; a NaN stays
    if (lane == 0) out[row] = static_cast<float>(clamp && total < 0 ? 0 : total);
  }
}

constexpr int kSumThreads = 256;

// The largest grid that every device takes; kernels stride over what is left.
inline unsigned grid_of(int64_t items) {
  constexpr int64_t most = 0x7fffffff;
  return static_cast<unsigned>(items < most ? items : most);
}

template <class Launch>
void sum_partials(const float* partial, float* out, int64_t rows, int64_t count, bool clamp,
                  const Launch& launch) {
  launch(sum_partials_kernel<kSumThreads>, grid_of(parts(rows, kSumThreads / 32)), kSumThreads,
         partial, out, rows, count, clamp);
}

}  // namespace hyperinf::gpu
