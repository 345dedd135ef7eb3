// One case of the emulated kernels: sizes, how the factors lie in memory, and the numbers.
#pragma once

#include <cstdint>
#include <vector>

struct Case {
  // 0 gradient, 1 squared norm, 2 dots, 3 GFIM, 4 the last block of a gradient beyond 2^31 entries
  int64_t op;
  int64_t layout;
  int64_t batch, tokens, rows, cols, count;
  int64_t ghost;
  double alpha;
  std::vector<float> delta, act, other;  // other: V of dots, C of GFIM
  std::vector<float> out;
};

// One function per way of forming products, each in an object of its own.
void run_scalar_float(Case& c);
void run_tf32(Case& c);
void run_tensor_bf16(Case& c);
void run_tensor_half(Case& c);
void run_scalar_bf16(Case& c);
