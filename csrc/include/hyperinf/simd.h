// One vector of floats, as wide as the instruction set this file is compiled for.
//
// The build compiles the kernels once per instruction set, each in a namespace of its own, so that
// the linker never merges two of them. For the same reason nothing of the standard library that
// is not a builtin is used below this line.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef HYPERINF_BF16_DOT
#include <immintrin.h>
#endif

#ifndef HYPERINF_ISA
#define HYPERINF_ISA portable
#define HYPERINF_LANES 4
#endif

namespace hyperinf::HYPERINF_ISA {

constexpr int kLanes = HYPERINF_LANES;
constexpr bool kWideRegisterFile = kLanes == 16;  // 32 vector registers instead of 16

using Vec = float __attribute__((vector_size(4 * HYPERINF_LANES)));

// A register of floats or doubles, and a group of four for transposes.
template <class S>
struct Simd;
template <>
struct Simd<float> {
  using Vec = float __attribute__((vector_size(4 * HYPERINF_LANES)));
  using Four = float __attribute__((vector_size(16)));
  static constexpr int lanes = HYPERINF_LANES;
};
template <>
struct Simd<double> {
  using Vec = double __attribute__((vector_size(4 * HYPERINF_LANES)));
  using Four = double __attribute__((vector_size(32)));
  static constexpr int lanes = HYPERINF_LANES / 2;
};

struct Bf16 {
  uint16_t bits;
};

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }

static inline float widen(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline Vec load(const Bf16* p) {
  using Half = uint16_t __attribute__((vector_size(2 * HYPERINF_LANES)));
  using Word = uint32_t __attribute__((vector_size(4 * HYPERINF_LANES)));
  Half half;
  std::memcpy(&half, p, sizeof half);
  const Word word = __builtin_convertvector(half, Word) << 16;
  Vec v;
  std::memcpy(&v, &word, sizeof v);
  return v;
}

// The first n < kLanes numbers, then zeros.
template <class Row>
static inline Vec load_part(const Row* p, int64_t n) {
  Vec v{};
  for (int64_t i = 0; i < n; ++i) v[i] = widen(p[i]);
  return v;
}

static inline Simd<double>::Vec load(const double* p) {
  Simd<double>::Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// A vector that several operations use is loaded once, not by each of them from memory.
static inline Vec in_register(Vec v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
static inline void store(double* p, Simd<double>::Vec v) { std::memcpy(p, &v, sizeof v); }

static inline Vec broadcast(float x) { return Vec{} + x; }

static inline float sum(Vec v) {
  // halves, then quarters: the same order on every compiler
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}

// 2 kLanes numbers of bf16 in memory order as two vectors: the even ones, then the odd ones. Half
// the work of widening them in order.
struct Pair {
  Vec even, odd;
};
using Words = uint32_t __attribute__((vector_size(4 * HYPERINF_LANES)));

static inline Pair load_pair(const Bf16* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  const Words even = words << 16, odd = words & 0xffff0000u;
  Pair pair;
  std::memcpy(&pair.even, &even, sizeof even);
  std::memcpy(&pair.odd, &odd, sizeof odd);
  return pair;
}

#ifdef HYPERINF_BF16_DOT
// The processor's own dot product of bf16 pairs: t += x[2i] y[2i] + x[2i+1] y[2i+1], in fp32.
static inline Vec dot_pairs(Vec t, Words x, Words y) {
  return (Vec)_mm512_dpbf16_ps((__m512)t, (__m512bh)x, (__m512bh)y);
}
#endif

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace hyperinf::HYPERINF_ISA
