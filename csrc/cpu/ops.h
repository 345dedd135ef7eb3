// Ops that other ops are built from.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace hyperinf {

// C (b, n1, n2) += alpha X Y^T; without Y, X X^T
void gram_accumulate_(const torch::stable::Tensor& C, const torch::stable::Tensor& X,
                      const std::optional<torch::stable::Tensor>& Y, double alpha,
                      bool runs = false);

}  // namespace hyperinf
