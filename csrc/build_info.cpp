// hyperinf_kernels._build: how the compiled kernels beside it were made.
#include <pybind11/pybind11.h>

namespace py = pybind11;

// compiler, flags, instruction sets, CUDA architectures, nvcc, torch: facts of the build as JSON
static py::dict build_info() {
  static const char* json =
#include "build_facts.h"
      ;
  py::dict facts = py::module_::import("json").attr("loads")(json);
  facts["compiler"] = __VERSION__;
  return facts;
}

PYBIND11_MODULE(_build, m) {
  m.doc() = "How the compiled kernels of hyperinf_kernels were made.";
  m.def("build_info", &build_info, "Compiler, flags, instruction sets and CUDA architectures.");
}
