// The CUDA half of the ops: checks that name the argument, allocation, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>

#include "cuda/kernels.h"

namespace hyperinf::bindings {

using namespace gpu;

namespace {

using Array = torch::stable::Tensor;
using torch::headeronly::ScalarType;

void check_dims(const char* name, const Array& t, int64_t dims) {
  STD_TORCH_CHECK(t.is_cuda(), name, " must be on a CUDA device as the other arguments are");
  STD_TORCH_CHECK(t.dim() == dims, name, " must have ", dims, " dimensions, got ", t.dim());
}

void check_float(const char* name, const Array& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be fp32");
}

void check_beside(const char* name, const Array& t, const Array& delta) {
  STD_TORCH_CHECK(t.get_device_index() == delta.get_device_index(), name,
                  " must be on the device of delta");
}

void check_factors(const Array& delta, const Array& act) {
  check_dims("delta", delta, 3);
  check_dims("act", act, 3);
  check_beside("act", act, delta);
  STD_TORCH_CHECK(delta.scalar_type() == act.scalar_type(), "delta and act must have one dtype");
  STD_TORCH_CHECK(delta.size(0) == act.size(0) && delta.size(1) == act.size(1),
                  "delta (B, T, O) and act (B, T, I) must share B and T");
}

template <class T>
Factors<T> factors(const Array& delta, const Array& act) {
  const auto data = [](const Array& t) { return static_cast<const T*>(t.const_data_ptr()); };
  return {data(delta),   delta.stride(0), delta.stride(1), delta.stride(2),
          data(act),     act.stride(0),   act.stride(1),   act.stride(2),
          delta.size(0), delta.size(1),   delta.size(2),   act.size(2)};
}

// read at every call, so that a program can turn it on for a part of its work
bool tf32_asked_for() {
  const char* value = std::getenv("HYPERINF_TF32");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

// run(Ops of the dtype's mode, the factors with their type)
template <class Run>
void with_mode(const Array& delta, const Array& act, const Run& run) {
  switch (delta.scalar_type()) {
    case ScalarType::Float:
      if (tf32_asked_for()) return run(Ops<Tf32>{}, factors<float>(delta, act));
      return run(Ops<Scalar<float>>{}, factors<float>(delta, act));
    case ScalarType::BFloat16:
      return run(Ops<Tensor<__nv_bfloat16>>{}, factors<__nv_bfloat16>(delta, act));
    case ScalarType::Half:
      return run(Ops<Tensor<__half>>{}, factors<__half>(delta, act));
    default:
      STD_TORCH_CHECK(false, "delta and act must be fp32, bf16 or fp16");
  }
}

Array floats(const Array& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, ScalarType::Float);
}

float* data(const Array& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Array grad(const Array& delta, const Array& act) {
  check_factors(delta, act);
  const Launch launch(delta.get_device_index());
  const Array out = floats(delta, {delta.size(0), delta.size(2), act.size(2)});
  if (out.numel() > 0)
    with_mode(delta, act, [&](auto ops, const auto& f) { ops.grad(f, data(out), launch); });
  return out;
}

Array norm_sq(const Array& delta, const Array& act, bool ghost) {
  check_factors(delta, act);
  const Launch launch(delta.get_device_index());
  const Array out = floats(delta, {delta.size(0)});
  const int64_t count = norm_partials(delta.size(1), delta.size(2), act.size(2), ghost);
  const Array partial = floats(delta, {delta.size(0), count});
  if (out.numel() > 0)
    with_mode(delta, act, [&](auto ops, const auto& f) {
      ops.norm_sq(f, ghost, data(partial), data(out), launch);
    });
  return out;
}

// a gradient exists only as a tile in registers, so there is no ghost form to choose
Array dot(const Array& delta, const Array& act, const Array& V) {
  check_factors(delta, act);
  check_dims("V", V, 3);
  check_float("V", V);
  STD_TORCH_CHECK(V.is_contiguous(), "V must be contiguous");
  check_beside("V", V, delta);
  STD_TORCH_CHECK(V.size(1) == delta.size(2) && V.size(2) == act.size(2),
                  "V must be (m, O, I) for delta (B, T, O) and act (B, T, I)");
  const Launch launch(delta.get_device_index());
  const Array out = floats(delta, {delta.size(0), V.size(0)});
  const Array partial =
      floats(delta, {delta.size(0), V.size(0), tiles_of(delta.size(2), act.size(2))});
  const Dots dots{static_cast<const float*>(V.const_data_ptr()), V.size(0), data(partial)};
  if (out.numel() > 0)
    with_mode(delta, act, [&](auto ops, const auto& f) { ops.dot(f, dots, data(out), launch); });
  return out;
}

void gfim(const Array& C, const Array& delta, const Array& act, double alpha) {
  check_factors(delta, act);
  check_dims("C", C, 2);
  check_float("C", C);
  check_beside("C", C, delta);
  STD_TORCH_CHECK(C.size(0) == act.size(2) && C.size(1) == act.size(2),
                  "C must be (I, I) for act (B, T, I)");
  const Launch launch(delta.get_device_index());
  if (C.numel() * delta.numel() == 0) return;
  const GfimPlan plan = gfim_plan(delta.size(0), delta.size(2), act.size(2));
  const Array partial = floats(delta, {plan.partials()});
  const Gfim arguments{data(C), C.stride(0), C.stride(1), alpha, plan.splits, data(partial)};
  with_mode(delta, act, [&](auto ops, const auto& f) { ops.gfim(f, arguments, launch); });
}

}  // namespace

}  // namespace hyperinf::bindings

// Whether this torch gives its streams; asked by the tests, where no device is at hand.
extern "C" __attribute__((visibility("default"))) int hyperinf_has_stream() {
  return hyperinf::gpu::stream_lookup() != nullptr;
}

STABLE_TORCH_LIBRARY_IMPL(hyperinf, CUDA, m) {
  m.impl("per_sample_grad", TORCH_BOX(&hyperinf::bindings::grad));
  m.impl("per_sample_norm_sq", TORCH_BOX(&hyperinf::bindings::norm_sq));
  m.impl("per_sample_dot", TORCH_BOX(&hyperinf::bindings::dot));
  m.impl("gfim_accumulate_", TORCH_BOX(&hyperinf::bindings::gfim));
}
