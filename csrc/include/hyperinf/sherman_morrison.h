// sherman_morrison on one slab of rows: each block of rows is read from memory once, for its norms
// and its dot products with the queries; while still in cache it is added up with its weights.
#pragma once

#include "hyperinf/simd.h"

namespace hyperinf::HYPERINF_ISA {

constexpr int kBlockRows = 8;
constexpr int64_t kChunk = 1024;  // columns of a block and of the queries kept in the L1 cache
constexpr int kTileRows = kWideRegisterFile ? 4 : 2;
constexpr int kTileQueries = 4;
constexpr int kTileVectors = kWideRegisterFile ? 4 : 2;

// dot[r][q] += g_r . v_q and norm[r] += g_r . g_r over `columns`, a multiple of the lanes. Each
// call starts from zero and adds its sums at the end, so that long rows lose no precision.
template <int R, int Q, bool Norms, class Row>
static inline void dot_tile(const Row* const* rows, const float* queries, int64_t query_stride,
                            int64_t columns, Vec (*dot)[kMaxQueries], Vec* norm) {
  Vec d[R][Q] = {}, s[R] = {};
  for (int64_t k = 0; k < columns; k += kLanes) {
    Vec v[Q];
    for (int q = 0; q < Q; ++q) v[q] = load(queries + q * query_stride + k);
    for (int r = 0; r < R; ++r) {
      const Vec g = load(rows[r] + k);
      if (Norms) s[r] += g * g;
      for (int q = 0; q < Q; ++q) d[r][q] += g * v[q];
    }
  }
  for (int r = 0; r < R; ++r) {
    if (Norms) norm[r] += s[r];
    for (int q = 0; q < Q; ++q) dot[r][q] += d[r][q];
  }
}

template <int R, class Row>
static inline void dot_rows(const Row* const* rows, const float* queries, int64_t stride, int n,
                            int64_t columns, Vec (*dot)[kMaxQueries], Vec* norm) {
  int q = 0;
  const auto at = [&](int i) { return reinterpret_cast<Vec(*)[kMaxQueries]>(&dot[0][i]); };
  if (n >= kTileQueries) {
    dot_tile<R, kTileQueries, true>(rows, queries, stride, columns, dot, norm);
    q = kTileQueries;
  } else if (n > 0) {
    dot_tile<R, 1, true>(rows, queries, stride, columns, dot, norm);
    q = 1;
  }
  for (; q + kTileQueries <= n; q += kTileQueries)
    dot_tile<R, kTileQueries, false>(rows, queries + q * stride, stride, columns, at(q), norm);
  for (; q < n; ++q)
    dot_tile<R, 1, false>(rows, queries + q * stride, stride, columns, at(q), norm);
}

// total_q += sum_r weight[q][r] g_r over V vectors of columns.
template <int Q, int V, class Row>
static inline void add_tile(const Row* const* rows, int count, int64_t k,
                            const float (*weight)[kBlockRows], float* total, int64_t stride) {
  Vec t[Q][V];
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) t[q][v] = load(total + q * stride + k + v * kLanes);
  for (int r = 0; r < count; ++r) {
    Vec g[V];
    for (int v = 0; v < V; ++v) g[v] = load(rows[r] + k + v * kLanes);
    for (int q = 0; q < Q; ++q)
      for (int v = 0; v < V; ++v) t[q][v] += g[v] * weight[q][r];
  }
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) store(total + q * stride + k + v * kLanes, t[q][v]);
}

template <int V, class Row>
static inline void add_vectors(const Row* const* rows, int count, int64_t k, int n,
                               const float (*weight)[kBlockRows], float* total, int64_t stride) {
  int q = 0;
  for (; q + kTileQueries <= n; q += kTileQueries)
    add_tile<kTileQueries, V>(rows, count, k, weight + q, total + q * stride, stride);
  for (; q < n; ++q) add_tile<1, V>(rows, count, k, weight + q, total + q * stride, stride);
}

// Dot products and norms of one block of rows with all queries, then weights, then the sums.
template <class Row>
static inline void add_block(const Row* const* rows, int count, const SlabArgs& a) {
  Vec dot[kBlockRows][kMaxQueries] = {}, norm[kBlockRows] = {};
  const int64_t whole = a.columns - a.columns % kLanes;
  const int n = static_cast<int>(a.n_queries);
  for (int64_t start = 0; start < whole; start += kChunk) {
    const int64_t columns = smaller(kChunk, whole - start);
    const Row* shifted[kBlockRows];
    for (int r = 0; r < count; ++r) shifted[r] = rows[r] + start;
    int r = 0;
    for (; r + kTileRows <= count; r += kTileRows)
      dot_rows<kTileRows>(shifted + r, a.queries + start, a.columns, n, columns, dot + r, norm + r);
    for (; r < count; ++r)
      dot_rows<1>(shifted + r, a.queries + start, a.columns, n, columns, dot + r, norm + r);
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

  constexpr int64_t step = kTileVectors * kLanes;
  int64_t k = 0;
  for (; k + step <= whole; k += step)
    add_vectors<kTileVectors>(rows, count, k, n, weight, a.total, a.columns);
  for (; k < whole; k += kLanes) add_vectors<1>(rows, count, k, n, weight, a.total, a.columns);
  for (; k < a.columns; ++k)
    for (int q = 0; q < n; ++q)
      for (int r = 0; r < count; ++r)
        a.total[q * a.columns + k] += weight[q][r] * widen(rows[r][k]);
}

template <class Row>
static inline void sherman_morrison_slab(const Row* G, const SlabArgs& a) {
  for (int64_t i = 0; i < a.n_queries * a.columns; ++i) a.total[i] = 0;
  for (int64_t start = 0; start < a.count; start += kBlockRows) {
    const Row* rows[kBlockRows];
    const int count = static_cast<int>(smaller(kBlockRows, a.count - start));
    for (int r = 0; r < count; ++r) rows[r] = G + (start + r) * a.row_stride;
    add_block(rows, count, a);
  }
}

}  // namespace hyperinf::HYPERINF_ISA
