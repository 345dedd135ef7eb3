// sherman_morrison on one slab of rows: each block of rows is read from memory once, for its norms
// and its dot products with the queries; while still in cache it is added up with its weights.
//
// Rows are read two vectors at a time. A pair of bf16 vectors comes as its even and its odd
// numbers, so the queries are put in that order before and the totals back in theirs after.
#pragma once

#include "hyperinf/simd.h"

namespace hyperinf::HYPERINF_ISA {

constexpr int kBlockRows = 8;
constexpr int kPair = 2 * kLanes;
constexpr int64_t kChunk = 1024;  // columns of a block and of the queries kept in the L1 cache
constexpr int kTileQueries = kWideRegisterFile ? 8 : 4;

static inline Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }

static inline Vec add_square(Vec t, const float*, const Pair& g) {
  t += g.even * g.even;
  return t + g.odd * g.odd;
}

static inline Vec add_square(Vec t, [[maybe_unused]] const Bf16* p,
                             [[maybe_unused]] const Pair& g) {
#ifdef HYPERINF_BF16_DOT
  Words words;
  std::memcpy(&words, p, sizeof words);
  return dot_pairs(t, words, words);
#else
  t += g.even * g.even;
  return t + g.odd * g.odd;
#endif
}

// dot[r][q] += g_r . v_q and norm[r] += g_r . g_r over `columns`, a multiple of a pair. Each call
// starts from zero and adds its sums at the end, so that long rows lose no precision.
template <int R, int Q, bool Norms, class Row>
static inline void dot_tile(const Row* const* rows, const float* queries, int64_t query_stride,
                            int64_t columns, Vec (*dot)[kMaxQueries], Vec* norm) {
  Vec d[R][Q] = {}, s[R] = {};
  for (int64_t k = 0; k < columns; k += kPair) {
    Pair g[R];
    for (int r = 0; r < R; ++r) {
      g[r] = load_pair(rows[r] + k);
      if (Norms) s[r] = add_square(s[r], rows[r] + k, g[r]);
    }
    for (int q = 0; q < Q; ++q) {
      const float* const v = queries + q * query_stride + k;
      const Vec first = load(v), second = load(v + kLanes);
      for (int r = 0; r < R; ++r) d[r][q] += g[r].even * first;
      for (int r = 0; r < R; ++r) d[r][q] += g[r].odd * second;
    }
  }
  for (int r = 0; r < R; ++r) {
    if (Norms) norm[r] += s[r];
    for (int q = 0; q < Q; ++q) dot[r][q] += d[r][q];
  }
}

template <int R, int Q, class Row>
static inline void dot_all_rows(const Row* const* rows, int count, const float* queries,
                                int64_t stride, int64_t columns, bool norms,
                                Vec (*dot)[kMaxQueries], Vec* norm) {
  int r = 0;
  for (; r + R <= count; r += R)
    if (norms)
      dot_tile<R, Q, true>(rows + r, queries, stride, columns, dot + r, norm + r);
    else
      dot_tile<R, Q, false>(rows + r, queries, stride, columns, dot + r, norm + r);
  for (; r < count; ++r)
    if (norms)
      dot_tile<1, Q, true>(rows + r, queries, stride, columns, dot + r, norm + r);
    else
      dot_tile<1, Q, false>(rows + r, queries, stride, columns, dot + r, norm + r);
}

// total_q += sum_r weight[q][r] g_r over a pair of vectors.
template <int Q, class Row>
static inline void add_tile(const Row* const* rows, int count, int64_t k,
                            const float (*weight)[kBlockRows], float* total, int64_t stride) {
  Vec t[Q][2];
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < 2; ++v) t[q][v] = load(total + q * stride + k + v * kLanes);
  for (int r = 0; r < count; ++r) {
    const Pair g = load_pair(rows[r] + k);
    for (int q = 0; q < Q; ++q) t[q][0] += g.even * weight[q][r];
    for (int q = 0; q < Q; ++q) t[q][1] += g.odd * weight[q][r];
  }
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < 2; ++v) store(total + q * stride + k + v * kLanes, t[q][v]);
}

// Dot products and norms of one block of rows with all queries, then weights, then the sums.
template <class Row>
static inline void add_block(const Row* const* rows, int count, const SlabArgs& a,
                             const float* queries) {
  Vec dot[kBlockRows][kMaxQueries] = {}, norm[kBlockRows] = {};
  const int64_t whole = a.columns - a.columns % kPair;
  const int n = static_cast<int>(a.n_queries);
  for (int64_t start = 0; start < whole; start += kChunk) {
    const int64_t columns = smaller(kChunk, whole - start);
    const Row* shifted[kBlockRows];
    for (int r = 0; r < count; ++r) shifted[r] = rows[r] + start;
    int q = 0;
    const auto part = [&]<int R, int Q>() {
      dot_all_rows<R, Q>(shifted, count, queries + q * a.columns + start, a.columns, columns,
                         q == 0, reinterpret_cast<Vec(*)[kMaxQueries]>(&dot[0][q]), norm);
      q += Q;
    };
    while (n - q >= kTileQueries) part.template operator()<2, kTileQueries>();
    if (kTileQueries > 4 && n - q >= 4) part.template operator()<kTileQueries / 2, 4>();
    while (q < n) part.template operator()<4, 1>();
  }

  float weight[kMaxQueries][kBlockRows];
  for (int r = 0; r < count; ++r) {
    float square = sum(norm[r]);
    for (int64_t k = whole; k < a.columns; ++k) square += widen(rows[r][k]) * widen(rows[r][k]);
    for (int q = 0; q < n; ++q) {
      float product = sum(dot[r][q]);
      for (int64_t k = whole; k < a.columns; ++k)
        product += widen(rows[r][k]) * a.queries[q * a.columns + k];
      weight[q][r] = product / (a.damping + square);
    }
  }

  for (int64_t k = 0; k < whole; k += kPair) {
    int q = 0;
    for (; q + kTileQueries <= n; q += kTileQueries)
      add_tile<kTileQueries>(rows, count, k, weight + q, a.total + q * a.columns, a.columns);
    for (; q + 4 <= n; q += 4)
      add_tile<4>(rows, count, k, weight + q, a.total + q * a.columns, a.columns);
    for (; q < n; ++q) add_tile<1>(rows, count, k, weight + q, a.total + q * a.columns, a.columns);
  }
  for (int64_t k = whole; k < a.columns; ++k)
    for (int q = 0; q < n; ++q)
      for (int r = 0; r < count; ++r)
        a.total[q * a.columns + k] += weight[q][r] * widen(rows[r][k]);
}

// Each pair of vectors from memory order to even numbers first, or back; columns past the last
// whole pair are left out. `to` may be `from`.
template <bool Back>
static inline void reorder(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; ++i, from += columns, to += columns)
    for (int64_t k = 0; k + kPair <= columns; k += kPair) {
      float pair[kPair];
      std::memcpy(pair, from + k, sizeof pair);
      for (int j = 0; j < kLanes; ++j)
        for (int odd = 0; odd < 2; ++odd)
          to[k + (Back ? 2 * j + odd : odd * kLanes + j)] =
              pair[Back ? odd * kLanes + j : 2 * j + odd];
    }
}

template <class Row>
static inline void sherman_morrison_slab(const Row* G, const SlabArgs& a, const float* queries) {
  for (int64_t i = 0; i < a.n_queries * a.columns; ++i) a.total[i] = 0;
  for (int64_t start = 0; start < a.count; start += kBlockRows) {
    const Row* rows[kBlockRows];
    const int count = static_cast<int>(smaller(kBlockRows, a.count - start));
    for (int r = 0; r < count; ++r) rows[r] = G + (start + r) * a.row_stride;
    add_block(rows, count, a, queries);
  }
}

static inline void sherman_morrison_slab(const SlabArgs& a) {
  if (a.type == RowType::kFloat)
    return sherman_morrison_slab(static_cast<const float*>(a.rows), a, a.queries);
  reorder<false>(a.queries, a.n_queries, a.columns, a.spare);
  sherman_morrison_slab(static_cast<const Bf16*>(a.rows), a, a.spare);
  reorder<true>(a.total, a.n_queries, a.columns, a.total);
}

}  // namespace hyperinf::HYPERINF_ISA
