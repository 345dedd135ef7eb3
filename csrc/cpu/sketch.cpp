// hyperinf::combine_rows and hyperinf::image_rows on CPU: what a few vectors see of many rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace hyperinf {

using torch::stable::Tensor;

namespace {

constexpr auto kDouble = torch::headeronly::ScalarType::Double;

void check_sketch(const Tensor& probes, const Tensor& P) {
  check_dims("P", P, 2);
  check_dims("the probes", probes, 2);
  STD_TORCH_CHECK(is_double(probes) && probes.is_contiguous(),
                  "the probes must be fp64 and contiguous");
  STD_TORCH_CHECK(P.size(1) <= 1 || P.stride(1) == 1, "rows of P must have unit stride");
}

const char* row_pointer(const Tensor& P, int64_t row, int64_t column) {
  return static_cast<const char*>(P.const_data_ptr()) +
         (row * P.stride(0) + column) * static_cast<int64_t>(P.element_size());
}

// X^T P (4, D) for weights X (n, 4); a panel of columns at a time, whose sums stay in cache
Tensor combine_rows(const Tensor& X, const Tensor& P) {
  constexpr int64_t panel = 512;
  check_sketch(X, P);
  const RowType type = row_type("P", P);
  const int64_t rows = P.size(0), columns = P.size(1);
  STD_TORCH_CHECK(X.size(0) == rows && X.size(1) == kSketchProbes,
                  "combine_rows: X must be (n, 4) for P (n, D)");
  Tensor out = new_output("P", X, {kSketchProbes, columns}, kDouble);
  auto* result = static_cast<double*>(out.mutable_data_ptr());
  const auto* weights = static_cast<const double*>(X.const_data_ptr());
  const Kernels& table = kernels();
  for_each_item((columns + panel - 1) / panel, [&](int64_t item, int64_t) {
    const int64_t first = item * panel, width = std::min(panel, columns - first);
    for (int64_t s = 0; s < kSketchProbes; ++s)
      std::fill_n(result + s * columns + first, width, 0.0);
    table.combine_rows({row_pointer(P, 0, first), type, P.stride(0), rows, width, weights,
                        result + first, columns});
  });
  return out;
}

// Z P^T P (4, D) for directions Z (4, D); chunks of rows, whose sums are added in their order
Tensor image_rows(const Tensor& Z, const Tensor& P) {
  constexpr int64_t most = 32, shortest = 128;
  check_sketch(Z, P);
  const RowType type = row_type("P", P);
  const int64_t rows = P.size(0), columns = P.size(1), size = kSketchProbes * columns;
  STD_TORCH_CHECK(Z.size(0) == kSketchProbes && Z.size(1) == columns,
                  "image_rows: Z must be (4, D) for P (n, D)");
  Tensor out = new_output("P", Z, {kSketchProbes, columns}, kDouble);
  const int64_t chunks = std::clamp<int64_t>(rows / shortest, 1, most);
  const int64_t each = (rows + chunks - 1) / chunks;
  const auto totals = aligned<double>(checked_product("P", {chunks, size}));
  std::fill_n(totals.get(), chunks * size, 0.0);
  const auto* directions = static_cast<const double*>(Z.const_data_ptr());
  const Kernels& table = kernels();
  for_each_item(chunks, [&](int64_t item, int64_t) {
    const int64_t first = item * each, count = std::min(each, rows - first);
    if (count > 0)
      table.image_rows({row_pointer(P, first, 0), type, P.stride(0), count, columns, directions,
                        totals.get() + item * size, columns});
  });
  auto* result = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < size; ++i) {
    double total = totals[i];
    for (int64_t c = 1; c < chunks; ++c) total += totals[c * size + i];
    result[i] = total;
  }
  return out;
}

}  // namespace

}  // namespace hyperinf

STABLE_TORCH_LIBRARY_IMPL(hyperinf, CPU, m) {
  m.impl("combine_rows", TORCH_BOX(&hyperinf::combine_rows));
  m.impl("image_rows", TORCH_BOX(&hyperinf::image_rows));
}
