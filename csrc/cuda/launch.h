// The only place that meets the CUDA runtime and torch's CUDA half: stream, device guard, errors.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

namespace hyperinf::gpu {

using StreamLookup = AOTITorchError (*)(int32_t, void**);

// A build of torch for CPUs has no libtorch_cuda.so, and in one for CUDA it is outside this
// library's scope: neither a plain nor a weak reference nor RTLD_DEFAULT finds the symbol in both.
inline StreamLookup stream_lookup() {
  static const StreamLookup found = []() -> StreamLookup {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch_cuda == nullptr) return nullptr;
    return reinterpret_cast<StreamLookup>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  return found;
}

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Holds one device, and starts kernels on the stream that is current there.
class Launch {
 public:
  explicit Launch(int32_t device) : guard_(device), stream_(current_stream(device)) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), unsigned grid, unsigned threads,
                  Arguments... arguments) const {
    kernel<<<grid, threads, 0, stream_>>>(arguments...);
    check(cudaGetLastError(), "launch");
  }

 private:
  static cudaStream_t current_stream(int32_t device) {
    STD_TORCH_CHECK(stream_lookup() != nullptr,
                    "a CUDA tensor was given, but libtorch_cuda.so has no stream for it");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(stream_lookup()(device, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace hyperinf::gpu
