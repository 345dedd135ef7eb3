// Stands in for the toolkit's header: warp matrix products with a layout of their own. Which thread
// holds which entry is left open by CUDA too, so a kernel that runs here relies on no layout.
#pragma once

#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulator.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
namespace precision {
struct tf32 {};
}  // namespace precision
enum layout_t { mem_row_major, mem_col_major };

template <class T>
struct Stored {
  using type = T;
};
template <>
struct Stored<precision::tf32> {
  using type = float;
};

// Entry e of lane l is entry e * 32 + l of the matrix, row by row.
template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static constexpr int kRows = std::is_same_v<Use, matrix_b> ? K : M;
  static constexpr int kCols = std::is_same_v<Use, matrix_a> ? K : N;
  static constexpr int num_elements = kRows * kCols / 32;
  static constexpr bool kByRow = !std::is_same_v<Layout, col_major>;
  using element_type = typename Stored<T>::type;
  element_type x[num_elements];
};

inline float widen(float x) { return x; }
inline float widen(__half x) { return __half2float(x); }
inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

inline float __float_to_tf32(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  if ((word & 0x7f800000u) != 0x7f800000u) word = (word + 0x1000u) & ~0x1fffu;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

inline int lane() { return static_cast<int>(emu::current % emu::kWarp); }

inline void check_address(const void* address, unsigned pitch, size_t size) {
  if (reinterpret_cast<uintptr_t>(address) % 32 != 0)
    emu::fail("a fragment's address is not aligned");
  if (pitch * size % 16 != 0) emu::fail("a fragment's pitch is not a multiple of 16 bytes");
}

template <class F>
void fill_fragment(F& f, float value) {
  for (auto& entry : f.x) entry = value;
}

template <class F, class T>
void load_matrix_sync(F& f, const T* from, unsigned pitch) {
  check_address(from, pitch, sizeof(T));
  emu::warp_sync();
  for (int e = 0; e < F::num_elements; ++e) {
    const int row = (e * 32 + lane()) / F::kCols, col = (e * 32 + lane()) % F::kCols;
    f.x[e] = F::kByRow ? from[row * pitch + col] : from[col * pitch + row];
  }
}

template <class F>
void store_matrix_sync(float* to, const F& f, unsigned pitch, layout_t layout) {
  check_address(to, pitch, sizeof(float));
  emu::warp_sync();
  for (int e = 0; e < F::num_elements; ++e) {
    const int row = (e * 32 + lane()) / F::kCols, col = (e * 32 + lane()) % F::kCols;
    (layout == mem_row_major ? to[row * pitch + col] : to[col * pitch + row]) = f.x[e];
  }
}

// The entry (row, col) of a fragment that is spread over this warp.
template <class F>
float entry(int row, int col) {
  const int at = row * F::kCols + col;
  const unsigned owner = emu::current / emu::kWarp * emu::kWarp + static_cast<unsigned>(at % 32);
  return widen(static_cast<const F*>(emu::objects[owner])->x[at / 32]);
}

template <class C, class A, class B>
void mma_sync(C& d, const A& a, const B& b, const C& c) {
  constexpr int depth = A::kCols;
  float rows[C::num_elements][depth];
  emu::objects[emu::current] = &a;
  emu::warp_sync();
  for (int e = 0; e < C::num_elements; ++e)
    for (int k = 0; k < depth; ++k) rows[e][k] = entry<A>((e * 32 + lane()) / C::kCols, k);
  emu::warp_sync();
  emu::objects[emu::current] = &b;
  emu::warp_sync();
  for (int e = 0; e < C::num_elements; ++e) {
    float sum = c.x[e];
    for (int k = 0; k < depth; ++k) sum += rows[e][k] * entry<B>(k, (e * 32 + lane()) % C::kCols);
    d.x[e] = sum;
  }
  emu::warp_sync();
}

}  // namespace nvcuda::wmma
