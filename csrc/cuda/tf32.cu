// The kernels for fp32 factors rounded to TF32, on tensor cores.
#include "cuda/instantiate.h"

template struct hyperinf::gpu::Ops<hyperinf::gpu::Tf32>;
