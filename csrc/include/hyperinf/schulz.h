// Every Schulz step of one small matrix without leaving the cache: products in register tiles, to
// which the scaled terms of the step's polynomial are added before they are stored.
#pragma once

#include "hyperinf/simd.h"

namespace hyperinf::HYPERINF_ISA {

// One term of a sum: factor * matrix.
struct Term {
  float factor;
  const float* matrix;
};

// Square matrices of side d whose rows are padded with zeros to whole vectors.
struct Square {
  int d;
  int64_t stride;

  // R rows and V vectors of out = alpha x y + terms
  template <int R, int V, class... Terms>
  void tile(float alpha, const float* x, const float* y, float* out, int row, int64_t column,
            Terms... terms) const {
    Vec t[R][V] = {};
    const float* a = x + row * stride;
    const float* b = y + column;
    for (int k = 0; k < d; ++k, b += stride) {
      Vec v[V];
      for (int j = 0; j < V; ++j) v[j] = load(b + j * kLanes);
      for (int i = 0; i < R; ++i)
        for (int j = 0; j < V; ++j) t[i][j] += v[j] * a[i * stride + k];
    }
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < V; ++j) {
        const int64_t at = (row + i) * stride + column + j * kLanes;
        Vec value = t[i][j] * alpha;
        ((value += load(terms.matrix + at) * terms.factor), ...);
        store(out + at, value);
      }
  }

  template <int V, class... Terms>
  void strip(float alpha, const float* x, const float* y, float* out, int64_t column,
             Terms... terms) const {
    constexpr int tall = kWideRegisterFile ? (V == 1 ? 16 : 8) : (V == 1 ? 8 : 4);
    int i = 0;
    for (; i + tall <= d; i += tall) tile<tall, V>(alpha, x, y, out, i, column, terms...);
    for (; i + 4 <= d; i += 4) tile<4, V>(alpha, x, y, out, i, column, terms...);
    for (; i < d; ++i) tile<1, V>(alpha, x, y, out, i, column, terms...);
  }

  // out = alpha x y + terms; out is neither x nor y
  template <class... Terms>
  void product(float alpha, const float* x, const float* y, float* out, Terms... terms) const {
    int64_t j = 0;
    for (; j + 2 * kLanes <= stride; j += 2 * kLanes) strip<2>(alpha, x, y, out, j, terms...);
    for (; j < stride; j += kLanes) strip<1>(alpha, x, y, out, j, terms...);
  }

  // out = terms + diagonal I; out may be one of the terms
  template <class... Terms>
  void combine(float* out, float diagonal, Terms... terms) const {
    for (int64_t at = 0; at < d * stride; at += kLanes) {
      Vec value{};
      ((value += load(terms.matrix + at) * terms.factor), ...);
      store(out + at, value);
    }
    add_identity(diagonal, out);
  }

  void add_identity(float factor, float* out) const {
    for (int i = 0; i < d; ++i) out[i * stride + i] += factor;
  }
};

// Z of one step X' = X Z from its residual R and coefficients c, both as in ops/schedule.py. R and
// the spare matrices are overwritten.
static inline void step_factor(const Square& s, int64_t degree, const float* c, float* R,
                               float* const* spare, float* Z) {
  if (degree == 2) return s.combine(Z, c[0], Term{c[1], R});  // b0 I + b1 R
  if (degree == 3) {                                          // I + b1 (R + R^2)
    s.product(c[0], R, R, Z, Term{c[0], R});
    return s.add_identity(1, Z);
  }
  float *const R2 = spare[0], *const P = spare[1], *const Q = spare[2];
  s.product(1, R, R, R2);
  if (degree == 5) {  // I + (b1 I + b3 R^2) (R + R^2)
    s.combine(P, 0, Term{1, R}, Term{1, R2});
    s.combine(Q, c[0], Term{c[1], R2});
    s.product(1, Q, P, Z);
    return s.add_identity(1, Z);
  }
  // degree 9: (Y + d2 R^2 + d1 R) (Y + e2 R^2) + e0 Y + b2 R^2 + b1 R + I, Y = R^2 (c1 R^2 + c2 R)
  const float c1 = c[0], c2 = c[1], d1 = c[2], d2 = c[3], e2 = c[4], e0 = c[5], b1 = c[6],
              b2 = c[7];
  float *const Y = P, *const left = Q, *const right = spare[3];
  s.combine(Q, 0, Term{c1, R2}, Term{c2, R});
  s.product(1, R2, Q, Y);
  s.combine(left, 0, Term{1, Y}, Term{d2, R2}, Term{d1, R});
  s.combine(right, 0, Term{1, Y}, Term{e2, R2});
  s.product(1, left, right, Z, Term{e0, Y}, Term{b2, R2}, Term{b1, R});
  s.add_identity(1, Z);
}

static void schulz(const SchulzArgs& a) {
  const Square s{a.d, (a.d + kLanes - 1) / kLanes * kLanes};
  float* buffers[kSchulzBuffers];
  for (int i = 0; i < kSchulzBuffers; ++i) buffers[i] = a.scratch + i * a.d * s.stride;
  float *const A = buffers[0], *X = buffers[1], *next = buffers[2], *const R = buffers[3];
  float* const* const spare = buffers + 4;
  float* const Z = buffers[kSchulzBuffers - 1];

  for (int i = 0; i < a.d; ++i)
    for (int64_t j = 0; j < s.stride; ++j)
      A[i * s.stride + j] = j < a.d ? a.matrix[i * a.row_stride + j * a.column_stride] : 0.0f;
  s.combine(X, a.start);
  for (int64_t k = 0; k < a.steps; ++k) {
    if (k == 0)
      s.combine(R, 1, Term{-a.start, A});
    else {
      s.product(-1, A, X, R);
      s.add_identity(1, R);
    }
    step_factor(s, a.degrees[k], a.coefficients + k * kCoefficients, R, spare, Z);
    if (k == 0)
      s.combine(next, 0, Term{a.start, Z});
    else
      s.product(1, X, Z, next);
    float* const last = X;
    X = next;
    next = last;
  }
  for (int i = 0; i < a.d; ++i)
    for (int j = 0; j < a.d; ++j) a.result[static_cast<int64_t>(i) * a.d + j] = X[i * s.stride + j];
}

}  // namespace hyperinf::HYPERINF_ISA
