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
static_assert(kGramRowGroup % kMr == 0);
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

#ifdef HYPERINF_BF16_DOT
// The same in bf16, by the processor's own dot product of pairs along the depth.

constexpr int64_t kPairs = kGramDepth<float>;  // as many words as floats of the other kernel

// One sliver of W rows in pairs: to[k * W + i] = entries 2k and 2k + 1 of row i, zero beyond both.
template <int W>
static inline void pack_pairs(Strided<Bf16> from, int64_t rows, int64_t depth, uint32_t* to) {
  const int64_t rs = from.row_stride, ds = from.depth_stride, pairs = (depth + 1) / 2;
  const auto word = [](Bf16 low, Bf16 high) {
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
  };
  for (int64_t first = 0; first < rows; first += W, to += W * pairs) {
    const Bf16* const sliver = from.data + first * rs;
    const int64_t count = smaller(W, rows - first);
    int64_t whole = 0;  // pairs written by a fast path
    if (count == W && rs == 1) {
      for (; whole < depth / 2; ++whole)
        for (int i = 0; i < W; ++i)
          to[whole * W + i] = word(sliver[2 * whole * ds + i], sliver[(2 * whole + 1) * ds + i]);
    } else if (count == W && ds == 1) {
      for (; whole + 4 <= depth / 2; whole += 4)
        for (int i = 0; i < W; i += 4) {
          const auto words = [&](int r) {
            Simd<float>::Four four;
            std::memcpy(&four, sliver + (i + r) * rs + 2 * whole, sizeof four);
            return four;
          };
          transpose4<float>(words(0), words(1), words(2), words(3),
                            reinterpret_cast<float*>(to + whole * W + i), W);
        }
    }
    for (int64_t k = whole; k < pairs; ++k)
      for (int i = 0; i < W; ++i) {
        const Bf16* const p = sliver + i * rs + 2 * k * ds;
        const Bf16 zero{0};
        to[k * W + i] = i < count ? word(p[0], 2 * k + 1 < depth ? p[ds] : zero) : 0;
      }
  }
}

template <bool Add>
static inline void register_tile_pairs(int64_t pairs, const uint32_t* x, const uint32_t* y,
                                       float* out) {
  Vec t[kMr][kNv] = {};
  for (int64_t k = 0; k < pairs; ++k, x += kMr, y += kNr<float>) {
    Words b[kNv];
    std::memcpy(b, y, sizeof b);
    for (int i = 0; i < kMr; ++i)
      for (int v = 0; v < kNv; ++v) t[i][v] = dot_pairs(t[i][v], Words{} + x[i], b[v]);
  }
  for (int i = 0; i < kMr; ++i)
    for (int v = 0; v < kNv; ++v) {
      float* p = out + i * kGramTile<float> + v * kLanes;
      store(p, Add ? load(p) + t[i][v] : t[i][v]);
    }
}

static void gram_tile_pairs(const GramArgs& a) {
  Strided<Bf16> x{static_cast<const Bf16*>(a.x), a.x_row_stride, a.x_depth_stride};
  Strided<Bf16> y{static_cast<const Bf16*>(a.y), a.y_row_stride, a.y_depth_stride};
  uint32_t* const packed_x = static_cast<uint32_t*>(a.panels);
  uint32_t* const packed_y = packed_x + kGramTile<float> * kPairs;
  float* const tile = static_cast<float*>(a.tile);
  for (int64_t start = 0; start < a.depth; start += 2 * kPairs) {
    const int64_t depth = smaller(2 * kPairs, a.depth - start), pairs = (depth + 1) / 2;
    pack_pairs<kMr>(x, a.rows, depth, packed_x);
    pack_pairs<kNr<float>>(y, a.cols, depth, packed_y);
    for (int64_t j = 0; j < a.cols; j += kNr<float>)
      for (int64_t i = 0; i < a.rows; i += kMr) {
        if (a.diagonal && i >= j + kNr<float>) break;
        float* const out = tile + i * kGramTile<float> + j;
        if (start == 0)
          register_tile_pairs<false>(pairs, packed_x + i * pairs, packed_y + j * pairs, out);
        else
          register_tile_pairs<true>(pairs, packed_x + i * pairs, packed_y + j * pairs, out);
      }
    x.data += depth * x.depth_stride;
    y.data += depth * y.depth_stride;
  }
}
#endif

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
