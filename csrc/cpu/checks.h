// Argument checks of the bindings; each error names the argument.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/kernels.h"

namespace hyperinf {

inline void check_dims(const char* name, const torch::stable::Tensor& t, int64_t dims) {
  STD_TORCH_CHECK(t.dim() == dims, name, " must have ", dims, " dimensions, got ", t.dim());
}

inline void check_float(const char* name, const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Float, name, " must be fp32");
}

inline void check_contiguous_float(const char* name, const torch::stable::Tensor& t) {
  check_float(name, t);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

inline RowType row_type(const char* name, const torch::stable::Tensor& t) {
  const auto type = t.scalar_type();
  STD_TORCH_CHECK(type == torch::headeronly::ScalarType::Float ||
                      type == torch::headeronly::ScalarType::BFloat16,
                  name, " must be fp32 or bf16");
  return type == torch::headeronly::ScalarType::Float ? RowType::kFloat : RowType::kBf16;
}

}  // namespace hyperinf
