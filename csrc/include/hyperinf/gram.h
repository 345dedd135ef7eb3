// One tile of X Y^T for the Gram and GFIM sums: packed panels, a register tile of broadcast
// multiply-adds, and only the upper part where the tile lies on the diagonal of X X^T.
#pragma once

#include "hyperinf/pack.h"

namespace hyperinf::HYPERINF_ISA {

constexpr int kMr = kWideRegisterFile ? 12 : 4;
constexpr int kNv = 2;
template <class Acc>
constexpr int kNr = kNv * Simd<Acc>::lanes;
static_assert(kGramTile<float> % kMr == 0 && kGramTile<float> % kNr<float> == 0);
static_assert(kGramTile<double> % kMr == 0 && kGramTile<double> % kNr<double> == 0);

// out (kMr, kNr) (+)= sum_k x[k][i] y[k][j]
template <bool Add, class Acc>
static inline void register_tile(int64_t depth, const Acc* x, const Acc* y, Acc* out) {
  constexpr int lanes = Simd<Acc>::lanes;
  typename Simd<Acc>::Vec t[kMr][kNv] = {};
  for (int64_t k = 0; k < depth; ++k, x += kMr, y += kNr<Acc>) {
    typename Simd<Acc>::Vec b[kNv];
    for (int v = 0; v < kNv; ++v) b[v] = load(y + v * lanes);
    for (int i = 0; i < kMr; ++i)
      for (int v = 0; v < kNv; ++v) t[i][v] += b[v] * x[i];
  }
  for (int i = 0; i < kMr; ++i)
    for (int v = 0; v < kNv; ++v) {
      Acc* p = out + i * kGramTile<Acc> + v * lanes;
      store(p, Add ? load(p) + t[i][v] : t[i][v]);
    }
}

template <bool Add, class Acc>
static void panel_product(const GramArgs& a, int64_t depth, const Acc* x, const Acc* y) {
  Acc* const tile = static_cast<Acc*>(a.tile);
  for (int64_t j = 0; j < a.cols; j += kNr<Acc>)
    for (int64_t i = 0; i < a.rows; i += kMr) {
      if (a.diagonal && i >= j + kNr<Acc>) break;  // below the diagonal from here on
      register_tile<Add>(depth, x + i * depth, y + j * depth, tile + i * kGramTile<Acc> + j);
    }
}

template <class Acc, class T>
static void gram_tile(const GramArgs& a) {
  Strided<T> x{static_cast<const T*>(a.x), a.x_row_stride, a.x_depth_stride};
  Strided<T> y{static_cast<const T*>(a.y), a.y_row_stride, a.y_depth_stride};
  Acc* const packed_x = static_cast<Acc*>(a.panels);
  Acc* const packed_y = packed_x + kGramTile<Acc> * kGramDepth<Acc>;
  for (int64_t start = 0; start < a.depth; start += kGramDepth<Acc>) {
    const int64_t depth = smaller(kGramDepth<Acc>, a.depth - start);
    pack<kMr>(x, a.rows, depth, packed_x);
    pack<kNr<Acc>>(y, a.cols, depth, packed_y);
    if (start == 0)
      panel_product<false>(a, depth, packed_x, packed_y);
    else
      panel_product<true>(a, depth, packed_x, packed_y);
    x.data += depth * x.depth_stride;
    y.data += depth * y.depth_stride;
  }
}

}  // namespace hyperinf::HYPERINF_ISA
