// hyperinf::schulz on CPU: one matrix per item, every step of it in the worker's own cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace hyperinf {

using torch::stable::Tensor;

static Tensor schulz(const Tensor& A, const Tensor& start, const Tensor& coefficients,
                     const std::vector<int64_t>& degrees) {
  check_dims("A", A, 3);
  check_dims("start", start, 1);
  check_dims("coefficients", coefficients, 3);
  check_float("A", A);
  check_contiguous_float("start", start);
  check_contiguous_float("coefficients", coefficients);
  const int64_t batch = A.size(0), d = A.size(1);
  const int64_t steps = static_cast<int64_t>(degrees.size());
  STD_TORCH_CHECK(A.size(2) == d, "A must hold square matrices, got ", d, " x ", A.size(2));
  STD_TORCH_CHECK(d <= kMaxSide, "A must be at most ", kMaxSide, " on a side, got ", d);
  STD_TORCH_CHECK(start.size(0) == batch, "start must hold one number per matrix");
  STD_TORCH_CHECK(coefficients.size(0) == batch && coefficients.size(1) == steps &&
                      coefficients.size(2) == kCoefficients,
                  "coefficients must be (b, steps, ", kCoefficients, ")");
  for (const int64_t degree : degrees)
    STD_TORCH_CHECK(degree == 2 || degree == 3 || degree == 5 || degree == 9,
                    "degrees must be 2, 3, 5 or 9, got ", degree);
  Tensor X = new_output("A", A, {batch, d, d});
  if (batch == 0 || d == 0) return X;

  const Kernels& table = kernels();
  const int64_t each = kSchulzBuffers * d * kMaxSide;
  const auto scratch = aligned_floats(worker_count(batch) * each);
  const auto* a = static_cast<const float*>(A.const_data_ptr());
  const auto* x0 = static_cast<const float*>(start.const_data_ptr());
  const auto* c = static_cast<const float*>(coefficients.const_data_ptr());
  auto* x = static_cast<float*>(X.mutable_data_ptr());
  for_each_item(batch, [&](int64_t b, int64_t worker) {
    table.schulz({a + b * A.stride(0), A.stride(1), A.stride(2), static_cast<int>(d), x0[b],
                  degrees.data(), c + b * steps * kCoefficients, steps, x + b * d * d,
                  scratch.get() + worker * each});
  });
  return X;
}

}  // namespace hyperinf

STABLE_TORCH_LIBRARY_IMPL(hyperinf, CPU, m) { m.impl("schulz", TORCH_BOX(&hyperinf::schulz)); }
