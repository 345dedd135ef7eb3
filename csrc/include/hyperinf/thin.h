// delta^T act of one sample where one side is thin, as in LoRA: rows of the wide side are read in
// the order in which they lie in memory, eight at a time, and the thin product stays in cache.
#pragma once

#include "hyperinf/simd.h"

namespace hyperinf::HYPERINF_ISA {

constexpr int kTokens = 8;
constexpr int kThinRows = kWideRegisterFile ? 8 : 4;  // of the product, in registers at once

// out (S, V vectors) (+)= sum_t thin[t][s] wide[t]; `part` columns where the last vector is cut.
template <int S, int V, class Row>
static inline void thin_tile(const ThinArgs& a, const Row* wide, int count, const float* thin,
                             float* out, bool first, int64_t part) {
  Vec t[S][V];
  for (int s = 0; s < S; ++s)
    for (int v = 0; v < V; ++v) t[s][v] = first ? Vec{} : load(out + s * kThinColumns + v * kLanes);
  for (int k = 0; k < count; ++k) {
    Vec w[V];
    for (int v = 0; v < V; ++v)
      w[v] = part == 0 ? load(wide + k * a.wide_stride + v * kLanes)
                       : load_part(wide + k * a.wide_stride, part);
    for (int s = 0; s < S; ++s)
      for (int v = 0; v < V; ++v) t[s][v] += w[v] * thin[k * kMostThin + s];
  }
  for (int s = 0; s < S; ++s)
    for (int v = 0; v < V; ++v) store(out + s * kThinColumns + v * kLanes, t[s][v]);
}

template <int S, class Row>
static inline void thin_rows(const ThinArgs& a, const Row* wide, int count, const float* thin,
                             float* out, bool first) {
  int64_t k = 0;
  for (; k + 2 * kLanes <= a.wide_columns; k += 2 * kLanes)
    thin_tile<S, 2>(a, wide + k, count, thin, out + k, first, 0);
  for (; k + kLanes <= a.wide_columns; k += kLanes)
    thin_tile<S, 1>(a, wide + k, count, thin, out + k, first, 0);
  if (k < a.wide_columns)
    thin_tile<S, 1>(a, wide + k, count, thin, out + k, first, a.wide_columns - k);
}

template <class Row>
static void thin_product(const ThinArgs& a) {
  const Row* thin = static_cast<const Row*>(a.thin);
  const Row* wide = static_cast<const Row*>(a.wide);
  float packed[kTokens * kMostThin];
  for (int64_t start = 0; start < a.tokens; start += kTokens) {
    const int count = static_cast<int>(smaller(kTokens, a.tokens - start));
    for (int k = 0; k < count; ++k)
      for (int s = 0; s < kMostThin; ++s)
        packed[k * kMostThin + s] = s < a.thin_columns ? widen(thin[k * a.thin_stride + s]) : 0.0f;
    for (int s = 0; s < a.thin_columns; s += kThinRows)
      if (kThinRows > 4 && a.thin_columns - s <= 4)
        thin_rows<4>(a, wide, count, packed + s, a.out + s * kThinColumns, start == 0);
      else
        thin_rows<kThinRows>(a, wide, count, packed + s, a.out + s * kThinColumns, start == 0);
    thin += count * a.thin_stride;
    wide += count * a.wide_stride;
  }
}

// sum_ij x_ij y_ij, each row summed in fp32, the rows in fp64
static double block_dot(const float* x, int64_t x_stride, const float* y, int64_t y_stride,
                        int64_t rows, int64_t columns) {
  double total = 0;
  for (int64_t i = 0; i < rows; ++i, x += x_stride, y += y_stride) {
    Vec t[4] = {};
    int64_t k = 0;
    for (; k + 4 * kLanes <= columns; k += 4 * kLanes)
      for (int v = 0; v < 4; ++v) t[v] += load(x + k + v * kLanes) * load(y + k + v * kLanes);
    for (; k + kLanes <= columns; k += kLanes) t[0] += load(x + k) * load(y + k);
    float row = sum((t[0] + t[1]) + (t[2] + t[3]));
    for (; k < columns; ++k) row += x[k] * y[k];
    total += row;
  }
  return total;
}

}  // namespace hyperinf::HYPERINF_ISA
