// What a few random vectors see of many rows, in fp64 and one reading: X P for weights of the rows,
// and Z P^T P for directions. Rows are widened in registers, so no copy of them is ever made.
#pragma once

#include "hyperinf/simd.h"

namespace hyperinf::HYPERINF_ISA {

using Wide = Simd<double>::Vec;
constexpr int kWide = Simd<double>::lanes;
constexpr int kProbes = kSketchProbes;
constexpr int kCombined = 8;                        // rows that share one load of the sums
constexpr int kImaged = kWideRegisterFile ? 4 : 2;  // rows whose dot products stay in registers

static inline Wide load_wide(const float* p) {
  using Half = float __attribute__((vector_size(2 * HYPERINF_LANES)));
  Half half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, Wide);
}

static inline Wide load_wide(const Bf16* p) {
  using Short = uint16_t __attribute__((vector_size(HYPERINF_LANES)));
  using Word = uint32_t __attribute__((vector_size(2 * HYPERINF_LANES)));
  using Half = float __attribute__((vector_size(2 * HYPERINF_LANES)));
  Short bits;
  std::memcpy(&bits, p, sizeof bits);
  const Word word = __builtin_convertvector(bits, Word) << 16;
  Half half;
  std::memcpy(&half, &word, sizeof half);
  return __builtin_convertvector(half, Wide);
}

// out[s][k] += sum_r weights[r][s] rows[r][k] of R rows
template <int R, class Row>
static inline void combine_block(const SketchArgs& a, const Row* rows, const double* weights) {
  int64_t k = 0;
  for (; k + kWide <= a.columns; k += kWide) {
    Wide t[kProbes];
    for (int s = 0; s < kProbes; ++s) t[s] = load(a.out + s * a.stride + k);
    for (int r = 0; r < R; ++r) {
      const Wide g = load_wide(rows + r * a.row_stride + k);
      for (int s = 0; s < kProbes; ++s) t[s] += g * weights[r * kProbes + s];
    }
    for (int s = 0; s < kProbes; ++s) store(a.out + s * a.stride + k, t[s]);
  }
  for (; k < a.columns; ++k)
    for (int r = 0; r < R; ++r) {
      const double g = static_cast<double>(widen(rows[r * a.row_stride + k]));
      for (int s = 0; s < kProbes; ++s) a.out[s * a.stride + k] += g * weights[r * kProbes + s];
    }
}

template <class Row>
static void combine_rows(const SketchArgs& a) {
  const Row* rows = static_cast<const Row*>(a.rows);
  int64_t i = 0;
  for (; i + kCombined <= a.count; i += kCombined)
    combine_block<kCombined>(a, rows + i * a.row_stride, a.probes + i * kProbes);
  for (; i < a.count; ++i) combine_block<1>(a, rows + i * a.row_stride, a.probes + i * kProbes);
}

// dots[r][s] = probes[s] . rows[r]
template <int R, class Row>
static inline void dots_block(const SketchArgs& a, const Row* rows, double* dots) {
  Wide t[R][kProbes] = {};
  int64_t k = 0;
  for (; k + kWide <= a.columns; k += kWide) {
    Wide z[kProbes];
    for (int s = 0; s < kProbes; ++s) z[s] = load(a.probes + s * a.columns + k);
    for (int r = 0; r < R; ++r) {
      const Wide g = load_wide(rows + r * a.row_stride + k);
      for (int s = 0; s < kProbes; ++s) t[r][s] += g * z[s];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < kProbes; ++s) {
      double total = 0;
      for (int i = 0; i < kWide; ++i) total += t[r][s][i];
      for (int64_t j = k; j < a.columns; ++j)
        total +=
            static_cast<double>(widen(rows[r * a.row_stride + j])) * a.probes[s * a.columns + j];
      dots[r * kProbes + s] = total;
    }
}

template <class Row>
static void image_rows(const SketchArgs& a) {
  const Row* rows = static_cast<const Row*>(a.rows);
  double dots[kImaged * kProbes];
  int64_t i = 0;
  for (; i + kImaged <= a.count; i += kImaged) {
    dots_block<kImaged>(a, rows + i * a.row_stride, dots);
    combine_block<kImaged>(a, rows + i * a.row_stride, dots);
  }
  for (; i < a.count; ++i) {
    dots_block<1>(a, rows + i * a.row_stride, dots);
    combine_block<1>(a, rows + i * a.row_stride, dots);
  }
}

}  // namespace hyperinf::HYPERINF_ISA
