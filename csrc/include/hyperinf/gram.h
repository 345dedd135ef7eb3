// One tile of X Y^T for the Gram and GFIM sums: packed panels, a register tile of broadcast
// multiply-adds, and only the upper part where the tile lies on the diagonal of X X^T.
#pragma once

#include "hyperinf/pack.h"

namespace hyperinf::HYPERINF_ISA {

constexpr int kMr = kWideRegisterFile ? 12 : 4;
constexpr int kNv = 2;
constexpr int kNr = kNv * kLanes;
static_assert(kGramTile % kMr == 0 && kGramTile % kNr == 0);

// out (kMr, kNr) (+)= sum_k x[k][i] y[k][j]
template <bool Add>
static inline void register_tile(int64_t depth, const float* x, const float* y, float* out) {
  Vec t[kMr][kNv] = {};
  for (int64_t k = 0; k < depth; ++k, x += kMr, y += kNr) {
    Vec b[kNv];
    for (int v = 0; v < kNv; ++v) b[v] = load(y + v * kLanes);
    for (int i = 0; i < kMr; ++i)
      for (int v = 0; v < kNv; ++v) t[i][v] += b[v] * x[i];
  }
  for (int i = 0; i < kMr; ++i)
    for (int v = 0; v < kNv; ++v) {
      float* p = out + i * kGramTile + v * kLanes;
      store(p, Add ? load(p) + t[i][v] : t[i][v]);
    }
}

template <bool Add>
static void panel_product(const GramArgs& a, int64_t depth, const float* x, const float* y) {
  for (int64_t j = 0; j < a.cols; j += kNr)
    for (int64_t i = 0; i < a.rows; i += kMr) {
      if (a.diagonal && i >= j + kNr) break;  // below the diagonal from here on
      register_tile<Add>(depth, x + i * depth, y + j * depth, a.tile + i * kGramTile + j);
    }
}

template <class T>
static void gram_tile(const GramArgs& a) {
  Strided<T> x{static_cast<const T*>(a.x), a.x_row_stride, a.x_depth_stride};
  Strided<T> y{static_cast<const T*>(a.y), a.y_row_stride, a.y_depth_stride};
  float* const packed_x = a.panels;
  float* const packed_y = a.panels + kGramTile * kGramDepth;
  for (int64_t start = 0; start < a.depth; start += kGramDepth) {
    const int64_t depth = smaller(kGramDepth, a.depth - start);
    pack<kMr>(x, a.rows, depth, packed_x);
    pack<kNr>(y, a.cols, depth, packed_y);
    if (start == 0)
      panel_product<false>(a, depth, packed_x, packed_y);
    else
      panel_product<true>(a, depth, packed_x, packed_y);
    x.data += depth * x.depth_stride;
    y.data += depth * y.depth_stride;
  }
}

}  // namespace hyperinf::HYPERINF_ISA
