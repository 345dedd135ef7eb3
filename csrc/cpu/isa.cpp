// Which compiled instruction set runs: asked of the processor, or named by HYPERINF_CPU_ISA.
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string_view>

#include "cpu/kernels.h"

namespace hyperinf {

namespace portable {
extern const Kernels kTable;
}

#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
namespace avx512bf16 {
extern const Kernels kTable;
}

static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

static bool always() { return true; }

static const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512bf16", has_avx512bf16, &avx512bf16::kTable},
    {"avx512", has_avx512, &avx512::kTable},
    {"avx2", has_avx2, &avx2::kTable},
#endif
    {"portable", always, &portable::kTable},
};

std::span<const Isa> compiled_isas() { return kIsas; }

const Kernels& kernels() {
  static const Isa* best = [] {
    for (const Isa& isa : kIsas)
      if (isa.supported()) return &isa;
    return &kIsas[0];
  }();
  // read at every call, so that a test can compare the paths in one process
  const char* wanted = std::getenv("HYPERINF_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *best->kernels;
  for (const Isa& isa : kIsas) {
    if (std::string_view(wanted) != isa.name) continue;
    STD_TORCH_CHECK(isa.supported(), "HYPERINF_CPU_ISA=", wanted, ": this processor has no ",
                    wanted);
    return *isa.kernels;
  }
  STD_TORCH_CHECK(false, "HYPERINF_CPU_ISA=", wanted,
                  " is not one of avx512bf16, avx512, avx2, portable");
}

}  // namespace hyperinf
