// hyperinf::schulz_adaptive on CPU: one matrix per item, from its tests to its certificate in
// cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace hyperinf {

using torch::stable::Tensor;

namespace {

const float* numbers(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor> schulz_adaptive(const Tensor& A, const std::optional<Tensor>& V,
                                           const std::optional<Tensor>& start,
                                           const std::optional<Tensor>& coefficients,
                                           const std::vector<int64_t>& degrees, const Tensor& menu,
                                           double goal, int64_t budget, bool certify) {
  check_dims("A", A, 3);
  check_float("A", A);
  const int64_t batch = A.size(0), d = A.size(1);
  const int64_t steps = static_cast<int64_t>(degrees.size());
  STD_TORCH_CHECK(A.size(2) == d, "A must hold square matrices, got ", d, " x ", A.size(2));
  STD_TORCH_CHECK(d <= kMaxSide, "A must be at most ", kMaxSide, " on a side, got ", d);
  STD_TORCH_CHECK(start.has_value() == coefficients.has_value(),
                  "start and coefficients belong together");
  if (start.has_value()) {
    check_dims("start", *start, 1);
    check_dims("coefficients", *coefficients, 3);
    check_contiguous_float("start", *start);
    check_contiguous_float("coefficients", *coefficients);
    STD_TORCH_CHECK(start->size(0) == batch, "start must hold one number per matrix");
    STD_TORCH_CHECK(coefficients->size(0) == batch && coefficients->size(1) == steps &&
                        coefficients->size(2) == kCoefficients,
                    "coefficients must be (b, steps, ", kCoefficients, ")");
  }
  STD_TORCH_CHECK(start.has_value() || steps == 0, "degrees need a start");
  for (const int64_t degree : degrees)
    STD_TORCH_CHECK(degree == 2 || degree == 3 || degree == 5 || degree == 9,
                    "degrees must be 2, 3, 5 or 9, got ", degree);
  check_dims("menu", menu, 2);
  check_contiguous_float("menu", menu);
  STD_TORCH_CHECK(menu.size(0) > 1 && menu.size(1) == kMenuColumns, "menu must be (polynomials, ",
                  kMenuColumns, ")");
  const auto* polynomials = static_cast<const float*>(menu.const_data_ptr());
  for (int64_t i = 0; i < menu.size(0); ++i) {
    const float degree = polynomials[i * kMenuColumns];
    STD_TORCH_CHECK(degree == 2 || degree == 3 || degree == 5 || degree == 9,
                    "menu: degrees must be 2, 3, 5 or 9, got ", degree);
  }
  int64_t rows = d;
  if (V.has_value()) {
    check_dims("V", *V, 3);
    check_contiguous_float("V", *V);
    STD_TORCH_CHECK(V->size(0) == batch && V->size(2) == d, "V must be (b, m, d) for A (b, d, d)");
    rows = V->size(1);
  }
  Tensor result = new_output(V.has_value() ? "V" : "A", A, {batch, rows, d});
  Tensor facts = new_output("A", A, {batch, kFacts}, torch::headeronly::ScalarType::Double);
  if (batch == 0) return {result, facts};

  const Kernels& table = kernels();
  const int64_t each = kSchulzBuffers * ((d + 3) / 4 * 4) * kMaxSide;
  const auto scratch = aligned_floats(worker_count(batch) * each);
  const auto* a = static_cast<const float*>(A.const_data_ptr());
  const float *v = numbers(V), *x0 = numbers(start), *c = numbers(coefficients);
  auto* to = static_cast<float*>(result.mutable_data_ptr());
  auto* told = static_cast<double*>(facts.mutable_data_ptr());
  // several small matrices in a row, so that handing them out costs nothing
  const int64_t run = std::clamp<int64_t>(batch / 64, 1, 16);
  for_each_item((batch + run - 1) / run, [&](int64_t item, int64_t worker) {
    const int64_t end = std::min(batch, (item + 1) * run);
    for (int64_t b = item * run; b < end; ++b)
      table.schulz_adaptive({.matrix = a + b * A.stride(0),
                             .row_stride = A.stride(1),
                             .column_stride = A.stride(2),
                             .d = static_cast<int>(d),
                             .scheduled = x0 != nullptr,
                             .start = x0 == nullptr ? 0.0f : x0[b],
                             .degrees = degrees.data(),
                             .coefficients = c == nullptr ? c : c + b * steps * kCoefficients,
                             .steps = steps,
                             .menu = polynomials,
                             .polynomials = menu.size(0),
                             .goal = goal,
                             .budget = budget,
                             .certify = certify,
                             .queries = v == nullptr ? v : v + b * rows * d,
                             .n_queries = rows,
                             .result = to + b * rows * d,
                             .facts = told + b * kFacts,
                             .scratch = scratch.get() + worker * each});
  });
  return {result, facts};
}

}  // namespace

}  // namespace hyperinf

STABLE_TORCH_LIBRARY_IMPL(hyperinf, CPU, m) {
  m.impl("schulz_adaptive", TORCH_BOX(&hyperinf::schulz_adaptive));
}
