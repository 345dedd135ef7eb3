// hyperinf::row_dots, span and span_dots on CPU: rows P in several tensors against a few queries.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <thread>
#include <tuple>
#include <vector>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace hyperinf {

using torch::stable::Tensor;
constexpr auto kDouble = torch::headeronly::ScalarType::Double;

namespace {

// The rows of all tensors, one after the other.
struct Rows {
  struct Part {
    const char* data;
    int64_t stride, count, first;
  };
  std::vector<Part> parts;
  RowType type;
  int64_t count = 0, columns, width;

  Rows(const std::vector<Tensor>& tensors, const Tensor& V) {
    STD_TORCH_CHECK(!tensors.empty(), "rows must hold at least one tensor");
    check_dims("V", V, 2);
    check_contiguous_float("V", V);
    columns = V.size(1);
    type = row_type("rows", tensors[0]);
    width = static_cast<int64_t>(tensors[0].element_size());
    for (const Tensor& t : tensors) {
      check_dims("rows", t, 2);
      STD_TORCH_CHECK(row_type("rows", t) == type, "rows must have one dtype");
      STD_TORCH_CHECK(t.size(1) == columns, "rows and V must have the same D");
      STD_TORCH_CHECK(columns <= 1 || t.stride(1) == 1, "rows must have unit column stride");
      if (t.size(0) == 0) continue;
      parts.push_back(
          {static_cast<const char*>(t.const_data_ptr()), t.stride(0), t.size(0), count});
      count += t.size(0);
    }
  }

  // work(row, pointer, stride, count) on blocks of at most `most` rows of [begin, end)
  template <class Work>
  void blocks(int64_t begin, int64_t end, int64_t most, const Work& work) const {
    for (const Part& part : parts) {
      const int64_t stop = std::min(end, part.first + part.count);
      for (int64_t i = std::max(begin, part.first); i < stop; i += most)
        work(i, part.data + (i - part.first) * part.stride * width, part.stride,
             std::min(most, stop - i));
    }
  }
};

constexpr int64_t blocks_of(int64_t columns) { return (columns + kQueryBlock - 1) / kQueryBlock; }

// Queries (n, columns) as the kernels read them: block by block of their columns.
void pack_queries(const float* from, int64_t stride, int64_t queries, int64_t columns, float* to) {
  for (int64_t c = 0; c < columns; c += kQueryBlock, to += queries * kQueryBlock)
    for (int64_t q = 0; q < queries; ++q)
      std::copy_n(from + q * stride + c, std::min(kQueryBlock, columns - c), to + q * kQueryBlock);
}

constexpr int64_t kItemRows = 4 * kDotRows;
constexpr int64_t kItemColumns = 1024;

std::tuple<Tensor, Tensor> row_dots(std::vector<Tensor> tensors, const Tensor& V) {
  const Rows rows(tensors, V);
  const int64_t queries = V.size(0), columns = rows.columns;
  Tensor dots = new_output("rows and V", V, {rows.count, queries}, kDouble);
  Tensor norms = new_output("rows", V, {rows.count}, kDouble);
  auto* const out = static_cast<double*>(dots.mutable_data_ptr());
  auto* const squares = static_cast<double*>(norms.mutable_data_ptr());
  const auto* const v = static_cast<const float*>(V.const_data_ptr());
  const Kernels& table = kernels();
  const auto packed = aligned_floats(queries * blocks_of(columns) * kQueryBlock);
  pack_queries(v, columns, queries, columns, packed.get());
  // many queries pass from cache by several blocks of rows; a few rows are read as they lie
  const int64_t step = queries > 4 ? kItemColumns : columns;
  for_each_item((rows.count + kItemRows - 1) / kItemRows, [&](int64_t item, int64_t) {
    const int64_t begin = item * kItemRows, end = std::min(rows.count, begin + kItemRows);
    std::fill(out + begin * queries, out + end * queries, 0.0);
    std::fill(squares + begin, squares + end, 0.0);
    for (int64_t c = 0; c < columns; c += step)
      rows.blocks(begin, end, kDotRows, [&](int64_t i, const char* g, int64_t stride, int64_t n) {
        table.dot_block({g + c * rows.width, rows.type, stride, n, std::min(step, columns - c),
                         columns - c, packed.get() + c * queries, queries, out + i * queries,
                         squares + i});
      });
  });
  return {dots, norms};
}

// Columns that a worker takes at a time: few enough that its part of the rows stays in cache
// between the sums and the dot products. From the shape alone, so threads do not change a bit.
int64_t slice_columns(int64_t rows, int64_t width) {
  constexpr int64_t cached = 4 << 20, shortest = 256;
  int64_t columns = kSliceColumns;
  while (columns > shortest && rows * columns * width > cached) columns /= 2;
  return columns;
}

constexpr int64_t kMostAtOnce = 32;  // queries whose sums stay in cache

// W = a V + B^T P slice by slice of its columns; each slice is written, or dotted with the rows.
std::tuple<Tensor, Tensor> spanned(const Tensor& V, const std::vector<Tensor>& tensors,
                                   const Tensor& B, double a, bool dotted) {
  const Rows rows(tensors, V);
  const int64_t queries = V.size(0), columns = rows.columns, n = rows.count;
  check_dims("B", B, 2);
  check_contiguous_float("B", B);
  STD_TORCH_CHECK(B.size(0) == n && B.size(1) == queries, "B must be (n, m)");
  Tensor out = dotted ? new_output("rows and V", V, {n, queries}, kDouble)
                      : new_output("V", V, {queries, columns});
  Tensor norms = new_output("V", V, {queries}, kDouble);
  const auto* const v = static_cast<const float*>(V.const_data_ptr());
  const auto* const b = static_cast<const float*>(B.const_data_ptr());
  auto* const squares = static_cast<double*>(norms.mutable_data_ptr());
  std::fill(squares, squares + queries, 0.0);
  double* const scores = dotted ? static_cast<double*>(out.mutable_data_ptr()) : nullptr;
  float* const written = dotted ? nullptr : static_cast<float*>(out.mutable_data_ptr());
  if (dotted) std::fill(scores, scores + n * queries, 0.0);
  if (queries == 0 || columns == 0 || n == 0) return {out, norms};

  const int64_t each = slice_columns(n, rows.width), slices = (columns + each - 1) / each;
  const int64_t groups = (queries + kMostAtOnce - 1) / kMostAtOnce;
  const int64_t group = ((queries + groups - 1) / groups + 3) / 4 * 4;
  const int64_t most = std::min(group, queries), workers = worker_count(slices);
  const int64_t sums = most * kSliceColumns, own = dotted ? n * most : 0;
  const auto scratch = aligned<float>(workers * (kPanelFloats + 2 * sums) + n * most);
  const auto wide = aligned<double>(workers * (sums + own));
  float* const packed = scratch.get() + workers * (kPanelFloats + 2 * sums);
  const Kernels& table = kernels();
  for (int64_t q = 0; q < queries; q += group) {
    const int64_t m = std::min(group, queries - q);
    for (int64_t i = 0; i < n; ++i)
      std::copy(b + i * queries + q, b + i * queries + q + m, packed + i * m);
    std::atomic<int64_t> turn{0};
    for_each_item(slices, [&](int64_t slice, int64_t worker) {
      float* const panel = scratch.get() + worker * (kPanelFloats + 2 * sums);
      float *const partial = panel + kPanelFloats, *const W = partial + sums;
      double *const total = wide.get() + worker * (sums + own), *const dots = total + sums;
      const int64_t start = slice * each, length = std::min(each, columns - start);
      std::fill(total, total + m * kSliceColumns, 0.0);
      rows.blocks(0, n, n, [&](int64_t i, const char* g, int64_t stride, int64_t count) {
        table.sum_slice({g + start * rows.width, rows.type, stride, count, length, packed + i * m,
                         m, panel, partial, total});
      });
      double lengths[kMostAtOnce];
      for (int64_t p = 0; p < m; ++p) {
        const float* const line = v + (q + p) * columns + start;
        const double* const sum = total + p * kSliceColumns;
        float* const w = dotted ? W : written + (q + p) * columns + start;
        double square = 0;
        for (int64_t k = 0; k < length; ++k) {
          const auto x = static_cast<float>(a * line[k] + sum[k]);
          square += static_cast<double>(x) * x;
          w[dotted ? (k / kQueryBlock * m + p) * kQueryBlock + k % kQueryBlock : k] = x;
        }
        lengths[p] = square;
      }
      if (dotted) {
        std::fill(dots, dots + n * m, 0.0);
        rows.blocks(0, n, kDotRows, [&](int64_t i, const char* g, int64_t stride, int64_t count) {
          table.dot_block({g + start * rows.width, rows.type, stride, count, length, length, W, m,
                           dots + i * m, nullptr});
        });
      }
      // slices are added in their order, whoever is ready first
      while (turn.load(std::memory_order_acquire) != slice) std::this_thread::yield();
      for (int64_t p = 0; p < m; ++p) squares[q + p] += lengths[p];
      if (dotted)
        for (int64_t i = 0; i < n; ++i)
          for (int64_t p = 0; p < m; ++p) scores[i * queries + q + p] += dots[i * m + p];
      turn.store(slice + 1, std::memory_order_release);
    });
  }
  return {out, norms};
}

std::tuple<Tensor, Tensor> span(const Tensor& V, std::vector<Tensor> rows, const Tensor& B,
                                double a) {
  return spanned(V, rows, B, a, false);
}

std::tuple<Tensor, Tensor> span_dots(const Tensor& V, std::vector<Tensor> rows, const Tensor& B,
                                     double a) {
  return spanned(V, rows, B, a, true);
}

}  // namespace
}  // namespace hyperinf

STABLE_TORCH_LIBRARY_IMPL(hyperinf, CPU, m) {
  m.impl("row_dots", TORCH_BOX(&hyperinf::row_dots));
  m.impl("span", TORCH_BOX(&hyperinf::span));
  m.impl("span_dots", TORCH_BOX(&hyperinf::span_dots));
}
