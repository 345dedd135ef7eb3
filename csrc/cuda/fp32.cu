// The kernels for fp32 factors, plain multiply-adds.
#include "cuda/instantiate.h"

template struct hyperinf::gpu::Ops<hyperinf::gpu::Scalar<float>>;
