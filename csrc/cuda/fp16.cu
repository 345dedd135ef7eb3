// The kernels for fp16 factors on tensor cores.
#include "cuda/instantiate.h"

template struct hyperinf::gpu::Ops<hyperinf::gpu::Tensor<__half>>;
