// A block's share of X^T Y, kept in registers: plain fp32 multiply-adds, or tensor cores.
//
// Both forms have the same face: clear(), step() over one slab of the depth, visit() of every entry
// by exactly one thread, and store() to shared memory. Sums are fp32 always.
#pragma once

#include <mma.h>

#include <type_traits>

#include "hyperinf/device.cuh"

namespace hyperinf::gpu {

// How products are formed. Tf32 rounds fp32 inputs to 10 bits of mantissa: only where asked for.
template <class T>
struct Scalar {
  using Element = T;
  static constexpr bool kTensor = false;
};
template <class T>
struct Tensor {
  using Element = T;
  using Rounded = T;
  static constexpr bool kTensor = true;
  static constexpr int kDepth = 16;
};
struct Tf32 {
  using Element = float;
  using Rounded = nvcuda::wmma::precision::tf32;
  static constexpr bool kTensor = true;
  static constexpr int kDepth = 8;
};

// M x N entries per block. Scalar: each thread owns RM x RN of them. Tensor: WARPS_M warps along M.
template <int M, int N, int RM, int RN, int WARPS_M>
struct Tile {
  static constexpr int kM = M, kN = N, kRowsEach = RM, kColsEach = RN;
  static constexpr int kThreads = M / RM * (N / RN);
  static constexpr int kWarps = kThreads / 32, kWarpsM = WARPS_M, kWarpsN = kWarps / WARPS_M;
};

// Two slabs in flight. K_MAJOR: the depth is along a slab's rows, otherwise along its columns.
template <class T, class Shape, int DEPTH, bool K_MAJOR>
struct Slabs {
  static constexpr int kX = K_MAJOR ? Shape::kM * pitch<T>(DEPTH) : DEPTH * pitch<T>(Shape::kM);
  static constexpr int kY = K_MAJOR ? Shape::kN * pitch<T>(DEPTH) : DEPTH * pitch<T>(Shape::kN);
  alignas(128) T x[2][kX];
  alignas(128) T y[2][kY];
};

template <class Mode, class Shape, int DEPTH, bool K_MAJOR>
struct ScalarProduct {
  using T = typename Mode::Element;
  static constexpr int kM = Shape::kRowsEach, kN = Shape::kColsEach;
  static constexpr int kAcross = Shape::kN / kN, kDown = Shape::kM / kM;
  struct Stage {};
  float c[kM][kN];

  __device__ static int row(int a) { return static_cast<int>(threadIdx.x) / kAcross + a * kDown; }
  __device__ static int col(int b) { return static_cast<int>(threadIdx.x) % kAcross + b * kAcross; }

  __device__ void clear() {
    for (int a = 0; a < kM; ++a)
      for (int b = 0; b < kN; ++b) c[a][b] = 0;
  }

  __device__ void step(const T* x, const T* y) {
    constexpr int px = pitch<T>(K_MAJOR ? DEPTH : Shape::kM);
    constexpr int py = pitch<T>(K_MAJOR ? DEPTH : Shape::kN);
#pragma unroll 4
    for (int k = 0; k < DEPTH; ++k) {
      float xs[kM], ys[kN];
#pragma unroll
      for (int a = 0; a < kM; ++a)
        xs[a] = to_float(K_MAJOR ? x[row(a) * px + k] : x[k * px + row(a)]);
#pragma unroll
      for (int b = 0; b < kN; ++b)
        ys[b] = to_float(K_MAJOR ? y[col(b) * py + k] : y[k * py + col(b)]);
#pragma unroll
      for (int a = 0; a < kM; ++a)
#pragma unroll
        for (int b = 0; b < kN; ++b) c[a][b] += xs[a] * ys[b];
    }
  }

  __device__ void multiply_entries(const ScalarProduct& other) {
#pragma unroll
    for (int a = 0; a < kM; ++a)
#pragma unroll
      for (int b = 0; b < kN; ++b) c[a][b] *= other.c[a][b];
  }

  template <class F>
  __device__ void visit(Stage&, const F& f) const {
#pragma unroll
    for (int a = 0; a < kM; ++a)
#pragma unroll
      for (int b = 0; b < kN; ++b) f(row(a), col(b), c[a][b]);
  }

  __device__ void store(float* out, int row_pitch) const {
#pragma unroll
    for (int a = 0; a < kM; ++a)
#pragma unroll
      for (int b = 0; b < kN; ++b) out[row(a) * row_pitch + col(b)] = c[a][b];
  }
};

template <class Mode, class Shape, int DEPTH, bool K_MAJOR>
struct TensorProduct {
  using T = typename Mode::Element;
  using Rounded = typename Mode::Rounded;
  static constexpr int kK = Mode::kDepth;
  static constexpr int kM = Shape::kM / Shape::kWarpsM / 16, kN = Shape::kN / Shape::kWarpsN / 16;
  using Along = nvcuda::wmma::row_major;
  using Across = nvcuda::wmma::col_major;
  using A = nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, kK, Rounded,
                                   std::conditional_t<K_MAJOR, Along, Across>>;
  using B = nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, kK, Rounded,
                                   std::conditional_t<K_MAJOR, Across, Along>>;
  // one square of 16 x 16 per warp, in which entries get coordinates
  struct Stage {
    alignas(128) float squares[Shape::kWarps][256];
  };
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, kK, float> c[kM][kN];

  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int row(int i) { return (warp() / Shape::kWarpsN * kM + i) * 16; }
  __device__ static int col(int j) { return (warp() % Shape::kWarpsN * kN + j) * 16; }

  template <class Fragment>
  __device__ static void round(Fragment& f) {
    if constexpr (std::is_same_v<Mode, Tf32>)
      for (int e = 0; e < f.num_elements; ++e) f.x[e] = nvcuda::wmma::__float_to_tf32(f.x[e]);
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) nvcuda::wmma::fill_fragment(c[i][j], 0.0f);
  }

  __device__ void step(const T* x, const T* y) {
    constexpr int px = pitch<T>(K_MAJOR ? DEPTH : Shape::kM);
    constexpr int py = pitch<T>(K_MAJOR ? DEPTH : Shape::kN);
#pragma unroll
    for (int k = 0; k < DEPTH; k += kK) {
      B b[kN];
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        nvcuda::wmma::load_matrix_sync(b[j], y + (K_MAJOR ? col(j) * py + k : k * py + col(j)), py);
        round(b[j]);
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        A a;
        nvcuda::wmma::load_matrix_sync(a, x + (K_MAJOR ? row(i) * px + k : k * px + row(i)), px);
        round(a);
#pragma unroll
        for (int j = 0; j < kN; ++j) nvcuda::wmma::mma_sync(c[i][j], a, b[j], c[i][j]);
      }
    }
  }

  __device__ void multiply_entries(const TensorProduct& other) {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j)
        for (int e = 0; e < c[i][j].num_elements; ++e) c[i][j].x[e] *= other.c[i][j].x[e];
  }

  template <class F>
  __device__ void visit(Stage& stage, const F& f) const {
    float* square = stage.squares[warp()];
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        nvcuda::wmma::store_matrix_sync(square, c[i][j], 16, nvcuda::wmma::mem_row_major);
        __syncwarp();
        for (int e = static_cast<int>(threadIdx.x) % 32; e < 256; e += 32)
          f(row(i) + e / 16, col(j) + e % 16, square[e]);
        __syncwarp();
      }
  }

  __device__ void store(float* out, int row_pitch) const {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j)
        nvcuda::wmma::store_matrix_sync(out + row(i) * row_pitch + col(j), c[i][j], row_pitch,
                                        nvcuda::wmma::mem_row_major);
  }
};

template <class Mode, class Shape, int DEPTH, bool K_MAJOR = false>
using Product = std::conditional_t<Mode::kTensor, TensorProduct<Mode, Shape, DEPTH, K_MAJOR>,
                                   ScalarProduct<Mode, Shape, DEPTH, K_MAJOR>>;

// product = the tile at (x_at, y_at) of X^T Y: slabs of the depth, the next one on its way while
// the last is multiplied. K_MAJOR: X is (M, depth) and Y (N, depth), otherwise (depth, M), (depth,
// N).
template <class Mode, class Shape, int DEPTH, bool K_MAJOR, class P>
__device__ void multiply(P& product, Slabs<typename Mode::Element, Shape, DEPTH, K_MAJOR>& slabs,
                         const Operand<typename Mode::Element>& x, int64_t x_at,
                         const Operand<typename Mode::Element>& y, int64_t y_at) {
  constexpr int threads = Shape::kThreads;
  const auto load = [&](int64_t slab) {
    const int64_t k = slab * DEPTH;
    if constexpr (K_MAJOR) {
      load_slab<Shape::kM, DEPTH, threads>(slabs.x[slab & 1], x, x_at, k);
      load_slab<Shape::kN, DEPTH, threads>(slabs.y[slab & 1], y, y_at, k);
    } else {
      load_slab<DEPTH, Shape::kM, threads>(slabs.x[slab & 1], x, k, x_at);
      load_slab<DEPTH, Shape::kN, threads>(slabs.y[slab & 1], y, k, y_at);
    }
  };
  const int64_t count = parts(K_MAJOR ? x.cols : x.rows, DEPTH);
  product.clear();
  if (count > 0) load(0);
  __pipeline_commit();
  for (int64_t slab = 0; slab < count; ++slab) {
    if (slab + 1 < count) load(slab + 1);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    product.step(slabs.x[slab & 1], slabs.y[slab & 1]);
    __syncthreads();
  }
}

}  // namespace hyperinf::gpu
