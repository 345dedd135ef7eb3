// Dot products of rows with queries and sums of rows with weights, both as short chains: fp32 adds
// few numbers in a row and fp64 adds those sums, so that the rounding does not grow with the size.
#pragma once

#include "hyperinf/simd.h"

namespace hyperinf::HYPERINF_ISA {

constexpr int kRun = 16;                          // vectors that one register adds up
constexpr int kRuns = kWideRegisterFile ? 4 : 8;  // of them added in fp32
constexpr int64_t kRunColumns = kRun * kLanes;
constexpr int64_t kFlushColumns = kRuns * kRunColumns;
constexpr int kTileRows = kWideRegisterFile ? 4 : 3;
constexpr int kDotTile = 4;
constexpr int kCopied = 6;  // queries from which a run of the rows is copied first
constexpr int kGroup = 32;  // queries whose sums of a block of rows stay in cache
static_assert(kRun + kRuns - 1 + (kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2) <= kDotDepth);
static_assert(kDotRows % kTileRows == 0 && kQueryBlock % kRunColumns == 0);
static_assert(kSliceColumns % (2 * kLanes) == 0);

using Four = Simd<float>::Four;

static inline Four quarter(Vec v) {
#if HYPERINF_LANES == 16
  const auto half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) +
         __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif HYPERINF_LANES == 8
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  return v;
#endif
}

// The sums of four vectors.
static inline Four four_sums(const Vec* v) {
  const Four a = quarter(v[0]), b = quarter(v[1]), c = quarter(v[2]), d = quarter(v[3]);
  const Four ab =
      __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd =
      __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// sums[r][q] (+)= g_r . v_q over at most kRun vectors, lane by lane.
template <int R, int Q>
static inline void dot_run(const float* const* rows, const float* queries, int64_t vectors,
                           bool first, Vec (*sums)[kGroup]) {
  Vec t[R][Q] = {};
  for (int64_t k = 0; k < vectors; ++k) {
    Vec g[R];
    for (int r = 0; r < R; ++r) g[r] = load(rows[r] + k * kLanes);
    for (int q = 0; q < Q; ++q) {
      const Vec v = in_register(load(queries + q * kQueryBlock + k * kLanes));
      for (int r = 0; r < R; ++r) t[r][q] += g[r] * v;
    }
  }
  // unrolled, or the sums would pass through memory to be counted
  if (first) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) sums[r][q] = t[r][q];
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) sums[r][q] += t[r][q];
  }
}

template <int Q>
static inline void dot_rows_run(const float* const* rows, int64_t count, const float* queries,
                                int64_t vectors, bool first, Vec (*sums)[kGroup]) {
  int64_t r = 0;
  for (; r + kTileRows <= count; r += kTileRows)
    dot_run<kTileRows, Q>(rows + r, queries, vectors, first, sums + r);
  for (; r < count; ++r) dot_run<1, Q>(rows + r, queries, vectors, first, sums + r);
}

template <int R>
static inline void norm_run(const float* const* rows, int64_t vectors, bool first, Vec* sums) {
  Vec t[R] = {};
  for (int64_t k = 0; k < vectors; ++k)
    for (int r = 0; r < R; ++r) {
      const Vec g = load(rows[r] + k * kLanes);
      t[r] += g * g;
    }
  for (int r = 0; r < R; ++r) sums[r] = first ? t[r] : sums[r] + t[r];
}

template <class Row>
static inline void fetch(const Row* p, int64_t numbers) {
  constexpr int64_t line = 64 / sizeof(Row);
  for (int64_t k = 0; k < numbers; k += line) __builtin_prefetch(p + k, 0, 2);
}

// A run of the rows as floats in `wide`: rows whose distance is a power of two share few sets of a
// cache, and bf16 is widened once for all queries. Rows of floats for few queries stay where they
// are.
template <class Row>
static inline void float_rows(const DotArgs& a, int64_t column, int64_t vectors, float* wide,
                              const float** rows) {
  const Row* const G = static_cast<const Row*>(a.rows) + column;
  for (int64_t r = 0; r < a.count; ++r) {
    const Row* const from = G + r * a.row_stride;
    if constexpr (sizeof(Row) == sizeof(float))
      if (a.n_queries < kCopied) {
        rows[r] = from;
        continue;
      }
    float* const to = wide + r * kRunColumns;
    for (int64_t k = 0; k < vectors; ++k) store(to + k * kLanes, load(from + k * kLanes));
    rows[r] = to;
  }
}

template <class Row>
static void dot_block(const DotArgs& a) {
  const Row* const G = static_cast<const Row*>(a.rows);
  const int64_t whole = a.columns - a.columns % kLanes;
  alignas(64) float wide[kDotRows * kRunColumns];
  Vec sums[kDotRows][kGroup], squares[kDotRows];
  int64_t first_query = 0;
  do {
    const int64_t n = smaller(kGroup, a.n_queries - first_query);
    // of all queries, blocks of columns follow one another
    const float* const queries = a.queries + first_query * kQueryBlock;
    const auto place = [&](int64_t c) {
      return queries + c / kQueryBlock * a.n_queries * kQueryBlock + c % kQueryBlock;
    };
    const bool norms = a.norms != nullptr && first_query == 0;
    double* const dots = a.dots + first_query;
    for (int64_t start = 0; start < whole; start += kFlushColumns) {
      const int64_t end = smaller(whole, start + kFlushColumns);
      for (int64_t c = start; c < end; c += kRunColumns) {
        const int64_t vectors = smaller(kRunColumns, end - c) / kLanes;
        const bool first = c == start;
        const float* rows[kDotRows];
        float_rows<Row>(a, c, vectors, wide, rows);
        if (norms) {
          int64_t r = 0;
          for (; r + kTileRows <= a.count; r += kTileRows)
            norm_run<kTileRows>(rows + r, vectors, first, squares + r);
          for (; r < a.count; ++r) norm_run<1>(rows + r, vectors, first, squares + r);
        }
        // of the run that comes next, each tile of queries fetches its share of the rows
        const int64_t ahead = smaller(kRunColumns, a.ahead - c - kRunColumns);
        int64_t q = 0, fetched = 0;
        const auto fetch_until = [&](int64_t row) {
          for (; ahead > 0 && fetched < row; ++fetched)
            fetch(G + fetched * a.row_stride + c + kRunColumns, ahead);
        };
        if (n == 0) fetch_until(a.count);
        const auto tile = [&]<int Q>() {
          fetch_until((q + Q) * a.count / n);
          dot_rows_run<Q>(rows, a.count, place(c) + q * kQueryBlock, vectors, first,
                          reinterpret_cast<Vec(*)[kGroup]>(&sums[0][q]));
          q += Q;
        };
        while (n - q >= kDotTile) tile.template operator()<kDotTile>();
        while (n - q >= 2) tile.template operator()<2>();
        if (q < n) tile.template operator()<1>();
      }
      for (int64_t r = 0; r < a.count; ++r) {
        if (norms) a.norms[r] += sum(squares[r]);
        double* const line = dots + r * a.n_queries;
        int64_t q = 0;
        for (; q + 4 <= n; q += 4) {
          const Four four = four_sums(&sums[r][q]);
          for (int i = 0; i < 4; ++i) line[q + i] += four[i];
        }
        for (; q < n; ++q) line[q] += sum(sums[r][q]);
      }
    }
    for (int64_t r = 0; r < a.count; ++r)
      for (int64_t k = whole; k < a.columns; ++k) {
        const double g = widen(G[r * a.row_stride + k]);
        if (norms) a.norms[r] += g * g;
        for (int64_t q = 0; q < n; ++q) dots[r * a.n_queries + q] += g * place(k)[q * kQueryBlock];
      }
    first_query += n;
  } while (first_query < a.n_queries);
}

constexpr int kSumTile = kWideRegisterFile ? 12 : 4;
constexpr int64_t kPair2 = 2 * kLanes;
constexpr int64_t kSliver =
    (kPanelRows + 1) * kPair2;  // one row more: no two in one set of a cache

// partial[q] (+)= sum_r weight[r][q] g_r over a pair of vectors; `next` is fetched meanwhile.
template <int Q, class Row>
static inline void sum_tile(const float* panel, const float* weights, int64_t stride, int64_t rows,
                            bool first, float* partial, const Row* next, int64_t row_stride) {
  Vec t[Q][2] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const Vec g0 = in_register(load(panel + r * kPair2));
    const Vec g1 = in_register(load(panel + r * kPair2 + kLanes));
    if (next != nullptr) fetch(next + r * row_stride, kPair2);
    for (int q = 0; q < Q; ++q) {
      const float w = weights[r * stride + q];
      t[q][0] += g0 * w;
      t[q][1] += g1 * w;
    }
  }
#pragma GCC unroll 12
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < 2; ++v) {
      float* const p = partial + q * kPair2 + v * kLanes;
      store(p, first ? t[q][v] : load(p) + t[q][v]);
    }
}

template <class Row>
static inline void pack_panel(const Row* G, int64_t stride, int64_t rows, int64_t columns,
                              bool more, float* panel) {
  for (int64_t r = 0; r < rows; ++r) {
    const Row* const from = G + r * stride;
    float* to = panel + r * kPair2;
    int64_t k = 0;
    for (; k + kPair2 <= columns; k += kPair2, to += kSliver) {
      if (more) fetch(from + kPanelRows * stride + k, kPair2);
      store(to, load(from + k));
      store(to + kLanes, load(from + k + kLanes));
    }
    if (k < columns)
      for (int64_t i = 0; i < kPair2; ++i) to[i] = k + i < columns ? widen(from[k + i]) : 0.0f;
  }
}

template <class Row>
static void sum_slice(const SumArgs& a) {
  const Row* const G = static_cast<const Row*>(a.rows);
  const int64_t padded = (a.columns + kPair2 - 1) / kPair2 * kPair2;
  const int64_t n = a.n_queries;
  for (int64_t start = 0; start < a.count;) {
    // a few panels in fp32, then fp64
    for (int p = 0; p < kPanels && start < a.count; ++p, start += kPanelRows) {
      const int64_t rows = smaller(kPanelRows, a.count - start);
      const Row* const first = G + start * a.row_stride;
      // the next panel is fetched while this one is packed, or by the first queries of many
      const bool more = start + rows + kPanelRows <= a.count, many = n >= kCopied;
      pack_panel(first, a.row_stride, rows, a.columns, more && !many, a.panel);
      const float* const weights = a.weights + start * n;
      const Row* const after = more && many ? first + kPanelRows * a.row_stride : nullptr;
      for (int64_t q = 0; q < n;) {
        const auto tile = [&]<int Q>() {
          for (int64_t k = 0; k < padded; k += kPair2)
            sum_tile<Q>(a.panel + k / kPair2 * kSliver, weights + q, n, rows, p == 0,
                        a.partial + n * k + q * kPair2, q == 0 && after ? after + k : nullptr,
                        a.row_stride);
          q += Q;
        };
        if (n - q >= kSumTile)
          tile.template operator()<kSumTile>();
        else if (kSumTile > 8 && n - q >= 8)
          tile.template operator()<8>();
        else if (n - q >= 4)
          tile.template operator()<4>();
        else if (n - q >= 2)
          tile.template operator()<2>();
        else
          tile.template operator()<1>();
      }
    }
    for (int64_t k = 0; k < padded; k += kPair2)
      for (int64_t q = 0; q < n; ++q)
        for (int64_t i = 0; i < kPair2; ++i)
          a.total[q * kSliceColumns + k + i] += a.partial[n * k + q * kPair2 + i];
  }
}

}  // namespace hyperinf::HYPERINF_ISA
