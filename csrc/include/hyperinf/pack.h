// Copies of a strided matrix in the order in which a product reads it.
#pragma once

#include "hyperinf/simd.h"

namespace hyperinf::HYPERINF_ISA {

// Element (i, k) of the operand is at data[i * row_stride + k * depth_stride].
template <class T>
struct Strided {
  const T* data;
  int64_t row_stride;
  int64_t depth_stride;
};

template <class S, class T>
static inline typename Simd<S>::Four load4(const T* p) {
  return typename Simd<S>::Four{static_cast<S>(widen(p[0])), static_cast<S>(widen(p[1])),
                                static_cast<S>(widen(p[2])), static_cast<S>(widen(p[3]))};
}

template <>
inline Simd<float>::Four load4<float, float>(const float* p) {
  Simd<float>::Four v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class S>
static inline void store4(S* p, typename Simd<S>::Four v) {
  std::memcpy(p, &v, sizeof v);
}

// to[c * to_stride + r] = element c of row[r]: a 4 x 4 transpose in registers.
template <class S, class Four = typename Simd<S>::Four>
static inline void transpose4(Four r0, Four r1, Four r2, Four r3, S* to, int64_t to_stride) {
  const Four a = __builtin_shufflevector(r0, r1, 0, 4, 1, 5);
  const Four b = __builtin_shufflevector(r0, r1, 2, 6, 3, 7);
  const Four c = __builtin_shufflevector(r2, r3, 0, 4, 1, 5);
  const Four d = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
  store4<S>(to, __builtin_shufflevector(a, c, 0, 1, 4, 5));
  store4<S>(to + to_stride, __builtin_shufflevector(a, c, 2, 3, 6, 7));
  store4<S>(to + 2 * to_stride, __builtin_shufflevector(b, d, 0, 1, 4, 5));
  store4<S>(to + 3 * to_stride, __builtin_shufflevector(b, d, 2, 3, 6, 7));
}

// One sliver of W rows: to[k * W + i], rows beyond `rows` are zero.
template <int W, class T, class S>
static inline void pack_sliver(const Strided<T>& from, int64_t rows, int64_t depth, S* to) {
  static_assert(W % 4 == 0);
  const int64_t rs = from.row_stride, ds = from.depth_stride;
  if (rows == W && rs == 1) {
    for (int64_t k = 0; k < depth; ++k)
      for (int i = 0; i < W; ++i) to[k * W + i] = widen(from.data[k * ds + i]);
    return;
  }
  for (int64_t i = 0; i < W; i += 4) {
    const T* p = from.data + i * rs;
    int64_t k = 0;
    if (i + 4 <= rows && ds == 1)
      for (; k + 4 <= depth; k += 4)
        transpose4<S>(load4<S>(p + k), load4<S>(p + rs + k), load4<S>(p + 2 * rs + k),
                      load4<S>(p + 3 * rs + k), to + k * W + i, W);
    for (; k < depth; ++k)
      for (int64_t r = i; r < i + 4; ++r)
        to[k * W + r] = r < rows ? static_cast<S>(widen(from.data[r * rs + k * ds])) : S{0};
  }
}

// `rows` rows as slivers of W, one after another.
template <int W, class T, class S>
static inline void pack(Strided<T> from, int64_t rows, int64_t depth, S* to) {
  for (int64_t i = 0; i < rows; i += W, to += W * depth) {
    pack_sliver<W>(from, smaller(W, rows - i), depth, to);
    from.data += W * from.row_stride;
  }
}

}  // namespace hyperinf::HYPERINF_ISA
