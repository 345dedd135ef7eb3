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

// Square matrices of side d in rows of Stride floats, a constant so that a tile's rows need no
// pointers of their own; columns up to whole vectors are zero.
template <int Stride>
struct Square {
  int d;
  int width;  // d in whole vectors

  // R rows and V vectors of out = alpha x y + terms
  template <int R, int V, class... Terms>
  void tile(float alpha, const float* x, const float* y, float* out, int row, int column,
            Terms... terms) const {
    Vec t[R][V] = {};
    const float* a = x + row * Stride;
    const float* b = y + column;
    for (int k = 0; k < d; ++k, b += Stride, ++a) {
      Vec v[V];
      for (int j = 0; j < V; ++j) v[j] = load(b + j * kLanes);
      for (int i = 0; i < R; ++i)
        for (int j = 0; j < V; ++j) t[i][j] += v[j] * a[i * Stride];
    }
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < V; ++j) {
        const int at = (row + i) * Stride + column + j * kLanes;
        Vec value = t[i][j] * alpha;
        ((value += load(terms.matrix + at) * terms.factor), ...);
        store(out + at, value);
      }
  }

  template <int V, class... Terms>
  void strip(float alpha, const float* x, const float* y, float* out, int column,
             Terms... terms) const {
    constexpr int tall = (kWideRegisterFile ? 16 : 8) / V;
    int i = 0;
    for (; i + tall <= d; i += tall) tile<tall, V>(alpha, x, y, out, i, column, terms...);
    for (; i + 4 <= d; i += 4) tile<4, V>(alpha, x, y, out, i, column, terms...);
    for (; i < d; ++i) tile<1, V>(alpha, x, y, out, i, column, terms...);
  }

  // out = alpha x y + terms; out is neither x nor y
  template <class... Terms>
  void product(float alpha, const float* x, const float* y, float* out, Terms... terms) const {
    int j = 0;
    for (; j + 2 * kLanes <= width; j += 2 * kLanes) strip<2>(alpha, x, y, out, j, terms...);
    for (; j < width; j += kLanes) strip<1>(alpha, x, y, out, j, terms...);
  }

  // out = terms; out may be one of them
  template <class... Terms>
  void combine(float* out, Terms... terms) const {
    for (int i = 0; i < d; ++i)
      for (int at = i * Stride; at < i * Stride + width; at += kLanes) {
        Vec value{};
        ((value += load(terms.matrix + at) * terms.factor), ...);
        store(out + at, value);
      }
  }
};

// Scratch of one matrix. The identity is a matrix like the others: adding to single entries between
// whole vectors would stall every load that follows.
struct SchulzMatrices {
  float *A, *X, *Z, *R, *R2, *P, *Q, *S, *I;
};

// Z of one step X' = X Z from its residual R (none for degree 2 after the first step) and its
// coefficients, both as in ops/schedule.py.
template <int Stride>
static inline void step_factor(const Square<Stride>& s, int64_t degree, const float* c, bool first,
                               const SchulzMatrices& m) {
  if (degree == 2) {  // b0 I + b1 R
    if (first) return s.combine(m.Z, Term{c[0], m.I}, Term{c[1], m.R});
    return s.product(-c[1], m.A, m.X, m.Z, Term{c[0] + c[1], m.I});
  }
  if (degree == 3)  // I + b1 (R + R^2)
    return s.product(c[0], m.R, m.R, m.Z, Term{c[0], m.R}, Term{1, m.I});
  s.product(1, m.R, m.R, m.R2);
  if (degree == 5) {  // I + (b1 I + b3 R^2) (R + R^2)
    s.combine(m.P, Term{1, m.R}, Term{1, m.R2});
    s.combine(m.Q, Term{c[1], m.R2}, Term{c[0], m.I});
    return s.product(1, m.Q, m.P, m.Z, Term{1, m.I});
  }
  // degree 9: (Y + d2 R^2 + d1 R) (Y + e2 R^2) + e0 Y + b2 R^2 + b1 R + I, Y = R^2 (c1 R^2 + c2 R)
  const float c1 = c[0], c2 = c[1], d1 = c[2], d2 = c[3], e2 = c[4], e0 = c[5], b1 = c[6],
              b2 = c[7];
  float *const Y = m.P, *const left = m.Q, *const right = m.S;
  s.combine(left, Term{c1, m.R2}, Term{c2, m.R});
  s.product(1, m.R2, left, Y);
  s.combine(left, Term{1, Y}, Term{d2, m.R2}, Term{d1, m.R});
  s.combine(right, Term{1, Y}, Term{e2, m.R2});
  s.product(1, left, right, m.Z, Term{e0, Y}, Term{b2, m.R2}, Term{b1, m.R}, Term{1, m.I});
}

// The steps of a schedule from X = start I, for A and I in place; X is left in m.X. R of the first
// step is no product, nor is its X Z.
template <int Stride>
static inline void run_schedule(const Square<Stride>& s, SchulzMatrices& m, float start,
                                const int64_t* degrees, const float* coefficients, int64_t steps) {
  s.combine(m.X, Term{start, m.I});
  for (int64_t k = 0; k < steps; ++k) {
    if (k == 0)
      s.combine(m.R, Term{1, m.I}, Term{-start, m.A});
    else if (degrees[k] != 2)
      s.product(-1, m.A, m.X, m.R, Term{1, m.I});
    step_factor(s, degrees[k], coefficients + k * kCoefficients, k == 0, m);
    if (k == 0) {
      s.combine(m.X, Term{start, m.Z});
      continue;
    }
    s.product(1, m.X, m.Z, m.P);
    float* const last = m.X;
    m.X = m.P;
    m.P = last;
  }
}

template <int Stride>
static void schulz_steps(const SchulzArgs& a) {
  const Square<Stride> s{a.d, (a.d + kLanes - 1) / kLanes * kLanes};
  const auto at = [&](int i) { return a.scratch + static_cast<int64_t>(i) * a.d * Stride; };
  SchulzMatrices m{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
  for (int i = 0; i < a.d; ++i)
    for (int j = 0; j < s.width; ++j) {
      m.A[i * Stride + j] = j < a.d ? a.matrix[i * a.row_stride + j * a.column_stride] : 0.0f;
      m.I[i * Stride + j] = i == j ? 1.0f : 0.0f;
    }
  run_schedule(s, m, a.start, a.degrees, a.coefficients, a.steps);
  for (int i = 0; i < a.d; ++i)
    for (int j = 0; j < a.d; ++j) a.result[static_cast<int64_t>(i) * a.d + j] = m.X[i * Stride + j];
}

static void schulz(const SchulzArgs& a) {
  if (a.d <= 16)
    schulz_steps<16>(a);
  else if (a.d <= 32)
    schulz_steps<32>(a);
  else if (a.d <= 64)
    schulz_steps<64>(a);
  else
    schulz_steps<kMaxSide>(a);
}

}  // namespace hyperinf::HYPERINF_ISA
