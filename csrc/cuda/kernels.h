// The launchers as the bindings see them; each way of forming products is compiled in its own file.
#pragma once

#include "cuda/launch.h"
#include "hyperinf/gfim.cuh"

namespace hyperinf::gpu {

template <class Mode>
struct Ops {
  using T = typename Mode::Element;
  static void grad(const Factors<T>& f, float* out, const Launch& launch);
  static void norm_sq(const Factors<T>& f, bool ghost, float* partial, float* out,
                      const Launch& launch);
  static void dot(const Factors<T>& f, const Dots& dots, float* out, const Launch& launch);
  static void gfim(const Factors<T>& f, const Gfim& gfim, const Launch& launch);
};

extern template struct Ops<Scalar<float>>;
extern template struct Ops<Tf32>;
extern template struct Ops<Tensor<__nv_bfloat16>>;
extern template struct Ops<Tensor<__half>>;

}  // namespace hyperinf::gpu
