// Included by one file per way of forming products, which instantiates Ops for it.
#pragma once

#include "cuda/kernels.h"

namespace hyperinf::gpu {

template <class Mode>
void Ops<Mode>::grad(const Factors<T>& f, float* out, const Launch& launch) {
  per_sample_grad<Mode>(f, out, launch);
}

template <class Mode>
void Ops<Mode>::norm_sq(const Factors<T>& f, bool ghost, float* partial, float* out,
                        const Launch& launch) {
  per_sample_norm_sq<Mode>(f, ghost, partial, out, launch);
}

template <class Mode>
void Ops<Mode>::dot(const Factors<T>& f, const Dots& dots, float* out, const Launch& launch) {
  per_sample_dot<Mode>(f, dots, out, launch);
}

template <class Mode>
void Ops<Mode>::gfim(const Factors<T>& f, const Gfim& gfim, const Launch& launch) {
  gfim_accumulate<Mode>(f, gfim, launch);
}

}  // namespace hyperinf::gpu
