// Rows seen by four vectors, in double: sums of the rows with weights, and dot products with them.
// What a certificate is made of must not carry the rounding that it is to show.
#pragma once

#include "hyperinf/sketch.h"

namespace hyperinf::HYPERINF_ISA {

constexpr int kSeenTile = kWideRegisterFile ? 4 : 2;  // rows at a time

static inline double sum(Wide v) {
  for (int width = kWide / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}

// total[s] += sum_r weights[r][s] g_r
template <int R, class Row>
static inline void seen_sum(const Row* rows, int64_t stride, const double* weights,
                              int64_t columns, double* total, int64_t total_stride) {
  double w[R][kProbes];
  std::memcpy(w, weights, sizeof w);
  int64_t k = 0;
  for (; k + kWide <= columns; k += kWide) {
    Wide t[kProbes];
    for (int s = 0; s < kProbes; ++s) t[s] = load(total + s * total_stride + k);
    for (int r = 0; r < R; ++r) {
      const Wide g = load_wide(rows + r * stride + k);
      for (int s = 0; s < kProbes; ++s) t[s] += g * w[r][s];
    }
    for (int s = 0; s < kProbes; ++s) store(total + s * total_stride + k, t[s]);
  }
  for (; k < columns; ++k)
    for (int r = 0; r < R; ++r)
      for (int s = 0; s < kProbes; ++s)
        total[s * total_stride + k] += widen(rows[r * stride + k]) * w[r][s];
}

// dots[r][s] += g_r . total[s]
template <int R, class Row>
static inline void seen_dots(const Row* rows, int64_t stride, const double* total,
                               int64_t total_stride, int64_t columns, double* dots) {
  Wide t[R][kProbes] = {};
  int64_t k = 0;
  for (; k + kWide <= columns; k += kWide) {
    Wide g[R];
    for (int r = 0; r < R; ++r) g[r] = load_wide(rows + r * stride + k);
    for (int s = 0; s < kProbes; ++s) {
      const Wide z = load(total + s * total_stride + k);
      for (int r = 0; r < R; ++r) t[r][s] += g[r] * z;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < kProbes; ++s) {
      double rest = sum(t[r][s]);
      for (int64_t i = k; i < columns; ++i)
        rest += widen(rows[r * stride + i]) * total[s * total_stride + i];
      dots[r * kProbes + s] += rest;
    }
}

template <class Row>
static void seen_slice(const SeenArgs& a) {
  const Row* rows = static_cast<const Row*>(a.rows);
  int64_t r = 0;
  const auto step = [&]<int R>() {
    if (a.dots == nullptr)
      seen_sum<R>(rows + r * a.row_stride, a.row_stride, a.weights + r * kProbes, a.columns,
                    a.total, a.total_stride);
    else
      seen_dots<R>(rows + r * a.row_stride, a.row_stride, a.total, a.total_stride, a.columns,
                     a.dots + r * kProbes);
    r += R;
  };
  while (r + kSeenTile <= a.count) step.template operator()<kSeenTile>();
  while (r < a.count) step.template operator()<1>();
}

}  // namespace hyperinf::HYPERINF_ISA
