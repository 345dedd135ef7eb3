// The kernels for bf16 factors on tensor cores.
#include "cuda/instantiate.h"

template struct hyperinf::gpu::Ops<hyperinf::gpu::Tensor<__nv_bfloat16>>;
