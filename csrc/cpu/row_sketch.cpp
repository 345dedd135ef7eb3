// hyperinf::row_sketch on CPU: rows in several tensors, read once, a slice of columns at a time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace hyperinf {

using torch::stable::Tensor;

namespace {

constexpr int64_t kSlice = 1024;  // columns: a page of each row, and their sums stay in cache
constexpr int64_t kParts = 16;    // of all slices, each with dot products of its own

// X (n, s) fp64, rows (n_i, D) -> P^T X as (s, D) and P P^T X (n, s)
std::tuple<Tensor, Tensor> row_sketch(const Tensor& X, std::vector<Tensor> rows) {
  constexpr auto kDouble = torch::headeronly::ScalarType::Double;
  STD_TORCH_CHECK(!rows.empty(), "rows must hold at least one tensor");
  check_dims("X", X, 2);
  STD_TORCH_CHECK(is_double(X) && X.is_contiguous(), "X must be fp64 and contiguous");
  check_dims("rows", rows[0], 2);
  const RowType type = row_type("rows", rows[0]);
  const int64_t columns = rows[0].size(1), width = static_cast<int64_t>(rows[0].element_size());
  int64_t n = 0;
  for (const Tensor& t : rows) {
    check_dims("rows", t, 2);
    STD_TORCH_CHECK(row_type("rows", t) == type && t.size(1) == columns,
                    "rows must have one dtype and one D");
    STD_TORCH_CHECK(columns <= 1 || t.stride(1) == 1, "rows must have unit column stride");
    n += t.size(0);
  }
  const int64_t vectors = X.size(1);
  STD_TORCH_CHECK(X.size(0) == n, "X must have as many rows as there are");
  Tensor sums = new_output("X and rows", X, {vectors, columns}, kDouble);
  Tensor images = new_output("X", X, {n, vectors}, kDouble);
  if (vectors == 0) return {sums, images};

  const auto* const x = static_cast<const double*>(X.const_data_ptr());
  auto* const total = static_cast<double*>(sums.mutable_data_ptr());
  auto* const image = static_cast<double*>(images.mutable_data_ptr());
  const int64_t slices = (columns + kSlice - 1) / kSlice;
  // from the shape alone, so threads do not change a bit
  const int64_t parts = std::max<int64_t>(1, std::min(kParts, slices));
  const auto weights = aligned<double>(n * kSketchProbes);
  const auto dots = aligned<double>(parts * n * kSketchProbes);
  const int64_t workers = worker_count(parts);
  const auto local = aligned<double>(workers * kSketchProbes * kSlice);
  const Kernels& table = kernels();
  for (int64_t first = 0; first < vectors; first += kSketchProbes) {
    const int64_t count = std::min<int64_t>(kSketchProbes, vectors - first);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t s = 0; s < kSketchProbes; ++s)
        weights[i * kSketchProbes + s] = s < count ? x[i * vectors + first + s] : 0.0;
    for_each_item(parts, [&](int64_t part, int64_t worker) {
      double* const own = dots.get() + part * n * kSketchProbes;
      double* const sum = local.get() + worker * kSketchProbes * kSlice;
      std::fill(own, own + n * kSketchProbes, 0.0);
      for (int64_t slice = slices * part / parts; slice < slices * (part + 1) / parts; ++slice) {
        const int64_t start = slice * kSlice, length = std::min(kSlice, columns - start);
        std::fill(sum, sum + kSketchProbes * kSlice, 0.0);
        for (const bool dotted : {false, true}) {
          int64_t row = 0;
          for (const Tensor& t : rows) {
            const char* const at = static_cast<const char*>(t.const_data_ptr()) + start * width;
            table.seen_slice({at, type, t.stride(0), t.size(0), length,
                                weights.get() + row * kSketchProbes, sum, kSlice,
                                dotted ? own + row * kSketchProbes : nullptr});
            row += t.size(0);
          }
        }
        for (int64_t s = 0; s < count; ++s)
          std::copy(sum + s * kSlice, sum + s * kSlice + length,
                    total + (first + s) * columns + start);
      }
    });
    for (int64_t i = 0; i < n; ++i)
      for (int64_t s = 0; s < count; ++s) {
        double all = 0;
        for (int64_t part = 0; part < parts; ++part) all += dots[(part * n + i) * kSketchProbes + s];
        image[i * vectors + first + s] = all;
      }
  }
  return {sums, images};
}

}  // namespace
}  // namespace hyperinf

STABLE_TORCH_LIBRARY_IMPL(hyperinf, CPU, m) {
  m.impl("row_sketch", TORCH_BOX(&hyperinf::row_sketch));
}
