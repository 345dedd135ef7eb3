// hyperinf::spd_inverse on CPU: groups of matrices, one per SIMD lane, over threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace hyperinf {

using torch::stable::Tensor;

namespace {

// The packed lower triangle and four spare rows, for every lane.
int64_t scratch_floats(int64_t d, int64_t lanes) {
  const int64_t tiles = (d + 3) / 4;
  return (tiles * (tiles + 1) / 2 * 16 + 16 * tiles) * lanes;
}

std::tuple<Tensor, Tensor> spd_inverse(const Tensor& A, bool check) {
  check_dims("A", A, 3);
  check_float("A", A);
  const int64_t batch = A.size(0), d = A.size(1);
  STD_TORCH_CHECK(A.size(2) == d, "A must hold square matrices, got ", d, " x ", A.size(2));
  STD_TORCH_CHECK(d <= kMaxSide, "A must be at most ", kMaxSide, " on a side, got ", d);
  Tensor inverse = new_output("A", A, {batch, d, d});
  Tensor info = new_output("A", A, {batch}, torch::headeronly::ScalarType::Int);
  if (batch == 0) return {inverse, info};
  STD_TORCH_CHECK(d <= 1 || A.stride(2) == 1, "rows of A must have unit stride");

  const Kernels& table = kernels();
  const int64_t lanes = table.lanes, groups = (batch + lanes - 1) / lanes;
  const int64_t each = scratch_floats(d, lanes);
  const auto scratch = aligned_floats(worker_count(groups) * each);
  const auto* from = static_cast<const float*>(A.const_data_ptr());
  auto* to = static_cast<float*>(inverse.mutable_data_ptr());
  auto* failed = static_cast<int32_t*>(info.mutable_data_ptr());
  // a few groups in a row, so that each can fetch the next one
  const int64_t run = std::clamp<int64_t>(groups / 16, 1, 4);
  for_each_item((groups + run - 1) / run, [&](int64_t item, int64_t worker) {
    const int64_t end = std::min(groups, (item + 1) * run);
    for (int64_t group = item * run; group < end; ++group) {
      const int64_t first = group * lanes, count = std::min(lanes, batch - first);
      const int64_t ahead = group + 1 < end ? std::min(lanes, batch - first - count) : 0;
      table.spd_inverse_lanes({from + first * A.stride(0), A.stride(0), A.stride(1), count, ahead,
                               static_cast<int>(d), check, to + first * d * d, failed + first,
                               scratch.get() + worker * each});
    }
  });
  return {inverse, info};
}

}  // namespace

}  // namespace hyperinf

STABLE_TORCH_LIBRARY_IMPL(hyperinf, CPU, m) {
  m.impl("spd_inverse", TORCH_BOX(&hyperinf::spd_inverse));
}
