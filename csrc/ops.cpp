// The schema of every compiled op, and the Python module that carries them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"

STABLE_TORCH_LIBRARY(hyperinf, m) {
  // V (b, m, D) fp32, G (b, n, D) fp32 or bf16 with unit column stride, damping (b) fp32
  m.def("sherman_morrison(Tensor V, Tensor G, Tensor damping) -> Tensor");
  // rows of one dtype, fp32 or bf16, each (n_i, D) with unit column stride, n rows in all; V (m, D)
  // fp32, contiguous -> g_i . v_q (n, m) and ||g_i||^2 (n), both fp64
  m.def("row_dots(Tensor[] rows, Tensor V) -> (Tensor, Tensor)");
  // W = a V + B^T P of the same rows P (n, D) for B (n, m) fp32, contiguous -> W (m, D) fp32 and
  // ||w_q||^2 (m) fp64; or instead of W its dot products with the rows, (n, m) fp64
  m.def("span(Tensor V, Tensor[] rows, Tensor B, float a) -> (Tensor, Tensor)");
  m.def("span_dots(Tensor V, Tensor[] rows, Tensor B, float a) -> (Tensor, Tensor)");
  // C (b, n1, n2) += alpha X Y^T, X (b, n1, D), Y (b, n2, D) fp32 or bf16; no Y means X. C is fp32,
  // or fp64: then sums are fp64 and rows may be too, unless `runs`: then products of at most
  // kGramRun terms are summed in fp32, and these sums in fp64
  m.def("gram_accumulate_(Tensor(a!) C, Tensor X, Tensor? Y, float alpha, bool runs=False) -> ()");
  // X (n, 4), Z (4, D) fp64, contiguous, P (n, D) fp32 or bf16 with unit column stride: X^T P and
  // Z P^T P, (4, D) in fp64
  m.def("combine_rows(Tensor X, Tensor P) -> Tensor");
  m.def("image_rows(Tensor Z, Tensor P) -> Tensor");
  // X (n, s) fp64, rows of one dtype, fp32 or bf16, each (n_i, D) with unit column stride, n in all
  // -> X^T P (s, D) and P P^T X (n, s), both fp64
  m.def("row_sketch(Tensor X, Tensor[] rows) -> (Tensor, Tensor)");
  // delta (b, T, O), act (b, T, I) of one dtype, fp32 or bf16 (fp16 too on CUDA), with unit column
  // stride -> (b, O, I), (b), (b, m) for V (m, O, I) fp32, contiguous
  m.def("per_sample_grad(Tensor delta, Tensor act) -> Tensor");
  m.def("per_sample_norm_sq(Tensor delta, Tensor act, bool ghost) -> Tensor");
  m.def("per_sample_dot(Tensor delta, Tensor act, Tensor V) -> Tensor");
  m.def(
      "pairwise_dot(Tensor delta1, Tensor act1, Tensor delta2, Tensor act2, bool ghost) -> Tensor");
  // A (b, d, d) fp32, d <= 128, start (b), coefficients (b, steps, 8) fp32 -> X (b, d, d)
  m.def("schulz(Tensor A, Tensor start, Tensor coefficients, int[] degrees) -> Tensor");
  // A (b, d, d) fp32, d <= 128, V (b, m, d) fp32 or none, start (b) and coefficients (b, steps, 8)
  // of a chain for given bounds or none, menu (polynomials, 12) fp32 -> A^-1 (b, d, d) or V A^-1
  // (b, m, d), and facts (b, 6) fp64: fit, residual, how it is known, floor, products, steps
  m.def(
      "schulz_adaptive(Tensor A, Tensor? V, Tensor? start, Tensor? coefficients, int[] degrees, "
      "Tensor menu, float goal, int budget, bool certify) -> (Tensor, Tensor)");
  // A (b, d, d) fp32 or fp64 -> (b, 6) fp64: largest |a|, largest |a - a^T|, least diagonal entry,
  // trace, sum of squares, largest sum of |a| of a row; all NaN where A is not finite
  m.def("matrix_norms(Tensor A) -> Tensor");
  // A (b, d, d) fp32, d <= 128 -> inverse (b, d, d) and LAPACK's info (b) int32. With `check` the
  // upper triangle is read too, and info is -1 for a matrix that is not symmetric to 1e-3 of its
  // largest entry, or not finite, or whose inverse is not
  m.def("spd_inverse(Tensor A, bool check=False) -> (Tensor, Tensor)");
  // C (I, I) fp32 += alpha sum_b g_b^T g_b of the gradients g_b = delta_b^T act_b; CUDA only
  m.def("gfim_accumulate_(Tensor(a!) C, Tensor delta, Tensor act, float alpha) -> ()");
}

namespace {

PyObject* cpu_isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const auto& entry : hyperinf::compiled_isas()) {
    if (names == nullptr || !entry.supported()) continue;
    PyObject* name = PyUnicode_FromString(entry.name);
    if (name == nullptr || PyList_Append(names, name) != 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

// given by the build: "sm_80,sm_90,compute_90", or nothing where there are no CUDA kernels
#ifndef HYPERINF_CUDA_ARCHS
#define HYPERINF_CUDA_ARCHS ""
#endif

PyObject* cuda_archs(PyObject*, PyObject*) { return PyUnicode_FromString(HYPERINF_CUDA_ARCHS); }

PyMethodDef methods[] = {{"cuda_archs", cuda_archs, METH_NOARGS,
                          "Architectures of the CUDA kernels, separated by commas."},
                         {"cpu_isas", cpu_isas, METH_NOARGS,
                          "Compiled instruction sets this processor runs, best first."},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "Compiled kernels of hyperinf_kernels.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* made = PyModule_Create(&module);
  if (made != nullptr && (PyModule_AddIntConstant(made, "dot_depth", hyperinf::kDotDepth) != 0 ||
                          PyModule_AddIntConstant(made, "sum_depth", hyperinf::kSumDepth) != 0))
    Py_CLEAR(made);
  return made;
}
