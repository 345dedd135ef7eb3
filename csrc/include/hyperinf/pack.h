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

static inline Vec4 load4(const float* p) {
  Vec4 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline Vec4 load4(const Bf16* p) {
  return Vec4{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}

static inline void store4(float* p, Vec4 v) { std::memcpy(p, &v, sizeof v); }

// to[c * to_stride + r] = element c of row[r]: a 4 x 4 transpose in registers.
static inline void transpose4(Vec4 r0, Vec4 r1, Vec4 r2, Vec4 r3, float* to, int64_t to_stride) {
  using Index = int32_t __attribute__((vector_size(16)));
  const Vec4 a = __builtin_shuffle(r0, r1, Index{0, 4, 1, 5});
  const Vec4 b = __builtin_shuffle(r0, r1, Index{2, 6, 3, 7});
  const Vec4 c = __builtin_shuffle(r2, r3, Index{0, 4, 1, 5});
  const Vec4 d = __builtin_shuffle(r2, r3, Index{2, 6, 3, 7});
  store4(to, __builtin_shuffle(a, c, Index{0, 1, 4, 5}));
  store4(to + to_stride, __builtin_shuffle(a, c, Index{2, 3, 6, 7}));
  store4(to + 2 * to_stride, __builtin_shuffle(b, d, Index{0, 1, 4, 5}));
  store4(to + 3 * to_stride, __builtin_shuffle(b, d, Index{2, 3, 6, 7}));
}

// One sliver of W rows: to[k * W + i], rows beyond `rows` are zero.
template <int W, class T>
static inline void pack_sliver(const Strided<T>& from, int64_t rows, int64_t depth, float* to) {
  static_assert(W % 4 == 0);
  int64_t k = 0;
  if (rows == W && from.row_stride == 1) {
    for (; k < depth; ++k) {
      const T* line = from.data + k * from.depth_stride;
      for (int i = 0; i < W; ++i) to[k * W + i] = widen(line[i]);
    }
  } else if (rows == W && from.depth_stride == 1) {
    for (; k + 4 <= depth; k += 4)
      for (int i = 0; i < W; i += 4) {
        const T* p = from.data + i * from.row_stride + k;
        const int64_t s = from.row_stride;
        transpose4(load4(p), load4(p + s), load4(p + 2 * s), load4(p + 3 * s), to + k * W + i, W);
      }
  }
  for (; k < depth; ++k)
    for (int i = 0; i < W; ++i)
      to[k * W + i] =
          i < rows ? widen(from.data[i * from.row_stride + k * from.depth_stride]) : 0.0f;
}

// `rows` rows as slivers of W, one after another.
template <int W, class T>
static inline void pack(Strided<T> from, int64_t rows, int64_t depth, float* to) {
  for (int64_t i = 0; i < rows; i += W, to += W * depth) {
    pack_sliver<W>(from, smaller(W, rows - i), depth, to);
    from.data += W * from.row_stride;
  }
}

}  // namespace hyperinf::HYPERINF_ISA
