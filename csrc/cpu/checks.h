// Argument checks of the bindings; each error names the argument.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <exception>
#include <initializer_list>
#include <utility>

#include "cpu/kernels.h"

namespace hyperinf {

// Every argument of every op comes here before its memory is read.
inline void check_dims(const char* name, const torch::stable::Tensor& t, int64_t dims) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU as the other arguments are");
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

inline bool is_double(const torch::stable::Tensor& t) {
  return t.scalar_type() == torch::headeronly::ScalarType::Double;
}

// Product of sizes; an error instead of an overflow, since views can be of any size.
inline int64_t checked_product(const char* name, std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes)
    STD_TORCH_CHECK(!__builtin_mul_overflow(product, size, &product), name, " is too large");
  return product;
}

// An uninitialised result, or an error that says which argument made it too large.
inline torch::stable::Tensor new_output(
    const char* cause, const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes,
    torch::headeronly::ScalarType type = torch::headeronly::ScalarType::Float) {
  checked_product(cause, sizes);
  try {
    return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type);
  } catch (const std::exception&) {
    STD_TORCH_CHECK(false, cause, ": no memory for the result");
  }
}

// First and last byte of a tensor; the two are equal for an empty one.
struct Extent {
  const char *first, *last;
};

inline Extent extent(const torch::stable::Tensor& t) {
  const char* first = static_cast<const char*>(t.const_data_ptr());
  if (t.numel() == 0) return {first, first};
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return {first, first + (last + 1) * static_cast<int64_t>(t.element_size())};
}

// An output must not lie in the memory of an input.
inline void check_apart(const char* output, const torch::stable::Tensor& out, const char* input,
                        const torch::stable::Tensor& in) {
  const Extent a = extent(out), b = extent(in);
  STD_TORCH_CHECK(a.first == a.last || b.first == b.last || a.last <= b.first || b.last <= a.first,
                  output, " must not overlap ", input, " in memory");
}

// Every entry of an output of three dimensions must have memory of its own.
inline void check_own_memory(const char* name, const torch::stable::Tensor& t) {
  int64_t axis[] = {0, 1, 2};
  const auto order = [&](int i, int j) {
    if (t.stride(axis[i]) > t.stride(axis[j])) std::swap(axis[i], axis[j]);
  };
  order(0, 1), order(1, 2), order(0, 1);
  int64_t span = 1;
  for (const int64_t i : axis) {
    if (t.size(i) == 1) continue;
    STD_TORCH_CHECK(t.stride(i) >= span, name, " overlaps itself in memory; clone it first");
    span += (t.size(i) - 1) * t.stride(i);
  }
}

}  // namespace hyperinf
