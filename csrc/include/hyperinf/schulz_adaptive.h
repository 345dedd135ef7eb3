// A Schulz inverse or solve of one small matrix that needs no bounds of its spectrum: tests,
// scaling, every step and the certificate while the matrix is in cache.
//
// X0 = I / min(||A||_inf, ||A||_F, trace). While eigenvalues of A X are still small, steps widen:
// the first polynomial of the menu brings all from 1/188 of the top up to within 1/2 of 1. A few
// power steps on R = I - A X, or its Frobenius norm once below 1, say when none is left; then the
// cheapest step contracts. The last one is X + X R, whose residual is R^2 and rounding.
#pragma once

#include "hyperinf/pack.h"
#include "hyperinf/schulz.h"

namespace hyperinf::HYPERINF_ISA {

constexpr double kRoundoff = 1.0 / (1 << 24);
constexpr float kKnownBelow = 0.95f;  // a Frobenius norm below it bounds the spectral one
constexpr float kResolved = 0.75f;    // radius below which nothing small is left
constexpr float kMargin = 1.1f;       // of a radius from power steps
constexpr int kPowerSteps = 6;
constexpr int kMostWidening = 6;
constexpr int kThinSteps = 40;
constexpr int kMostDense = 6;  // dense steps more, where thin ones stall
constexpr double kLargestFloor = 0.1;

static inline Vec size_of(Vec x) { return x < 0 ? -x : x; }
static inline Vec greater(Vec x, Vec y) { return x > y ? x : y; }
static inline float largest_lane(Vec v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

struct Norms {
  double frobenius, rows;  // rows: the largest absolute row sum
};

template <int Stride>
static inline double frobenius(const Square<Stride>& s, const float* x) {
  Vec total{};
  for (int i = 0; i < s.d; ++i)
    for (int at = i * Stride; at < i * Stride + s.width; at += kLanes) {
      const Vec v = load(x + at);
      total += v * v;
    }
  return __builtin_sqrt(static_cast<double>(sum(total)));
}

template <int Stride>
static inline Norms norms(const Square<Stride>& s, const float* x) {
  float most = 0;
  for (int i = 0; i < s.d; ++i) {
    Vec row{};
    for (int at = i * Stride; at < i * Stride + s.width; at += kLanes) row += size_of(load(x + at));
    const float total = sum(row);
    most = total > most ? total : most;
  }
  return {frobenius(s, x), most};
}

// to = x^T, in blocks of 4; rows up to the next multiple of 4 exist and are zero.
template <int Stride>
static inline void turn(const Square<Stride>& s, const float* x, float* to) {
  for (int i = 0; i < s.d; i += 4)
    for (int j = 0; j < s.d; j += 4) {
      const float* p = x + i * Stride + j;
      transpose4<float>(load4<float>(p), load4<float>(p + Stride), load4<float>(p + 2 * Stride),
                        load4<float>(p + 3 * Stride), to + j * Stride + i, Stride);
    }
}

// A / scale in m.A, its power of two, and whether A is finite, symmetric to 1e-3 of its largest
// entry, with a positive diagonal. `spare` is overwritten.
template <int Stride>
static inline bool read_matrix(const AdaptiveArgs& a, const Square<Stride>& s, float* A,
                               float* spare, float* scale) {
  const int padded = (s.d + 3) / 4 * 4;
  for (int i = 0; i < padded; ++i)
    for (int j = 0; j < Stride; j += kLanes) {
      Vec v{};
      const float* from = a.matrix + i * a.row_stride + j * a.column_stride;
      if (i < s.d && a.column_stride == 1 && j + kLanes <= s.d)
        v = load(from);
      else if (i < s.d)
        for (int l = 0; l < kLanes && j + l < s.d; ++l) v[l] = from[l * a.column_stride];
      store(A + i * Stride + j, v);
    }
  turn(s, A, spare);
  Vec largest{}, skew{}, nothing{};  // nothing: 0 * every entry, NaN where one is not finite
  for (int i = 0; i < s.d; ++i)
    for (int at = i * Stride; at < i * Stride + s.d; at += kLanes) {
      const Vec x = load(A + at);
      Vec y = load(spare + at);
      // columns of the transpose beyond the blocks of 4 were never written
      if (at + kLanes > i * Stride + s.d)
        for (int l = i * Stride + s.d - at; l < kLanes; ++l) y[l] = 0;
      nothing += 0.0f * x;
      largest = greater(size_of(x), largest);
      skew = greater(size_of(x - y), skew);
    }
  const float top = largest_lane(largest);
  bool fit = sum(nothing) == 0 && !(largest_lane(skew) > 1e-3f * top);
  for (int i = 0; i < s.d; ++i) fit = fit && A[i * Stride + i] > 0;
  *scale = 1;
  if (!fit || a.scheduled) return fit;
  int power = 0;
  (void)__builtin_frexpf(top, &power);
  power = power < -125 ? -125 : power > 126 ? 126 : power;
  *scale = __builtin_ldexpf(1.0f, power);
  const float inverse = __builtin_ldexpf(1.0f, -power);
  for (int i = 0; i < s.d; ++i)
    for (int at = i * Stride; at < i * Stride + s.width; at += kLanes)
      store(A + at, load(A + at) * inverse);
  return true;
}

// ||R||_2 of a nearly symmetric R by power steps: from below, close enough to tell 1 from 1/2.
template <int Stride>
static inline float radius(const Square<Stride>& s, const float* R, float* x, float* y) {
  uint32_t bits = 0x9e3779b9u;
  for (int j = 0; j < Stride; ++j) {
    bits = bits * 1664525u + 1013904223u;
    x[j] = j < s.d ? 0.5f + (bits >> 8) * (1.0f / (1 << 24)) : 0.0f;
    x[j] = (bits >> 7) & 1 ? x[j] : -x[j];
  }
  double last = 0, now = 0;
  for (int step = 0; step < kPowerSteps; ++step) {
    Vec square{};
    for (int j = 0; j < s.width; j += kLanes) {
      Vec t[4] = {};
      int k = 0;
      for (; k + 4 <= s.d; k += 4)
        for (int q = 0; q < 4; ++q) t[q] += load(R + (k + q) * Stride + j) * x[k + q];
      for (; k < s.d; ++k) t[0] += load(R + k * Stride + j) * x[k];
      const Vec v = (t[0] + t[1]) + (t[2] + t[3]);
      store(y + j, v);
      square += v * v;
    }
    last = now;
    if (step + 2 >= kPowerSteps) now = sum(square);
    float* const turned = x;
    x = y;
    y = turned;
  }
  return last > 0 ? static_cast<float>(__builtin_sqrt(now / last)) : 0.0f;
}

// ||I - A X||_F by four vectors of signs, products in double.
template <int Stride>
static inline double probed(const Square<Stride>& s, const float* A, const float* X) {
  using Four = Simd<double>::Four;
  Four z[kMaxSide], y[kMaxSide], total{};
  uint32_t bits = 0x85ebca6bu;
  for (int i = 0; i < s.d; ++i)
    for (int q = 0; q < 4; ++q) {
      bits = bits * 1664525u + 1013904223u;
      z[i][q] = bits >> 31 ? 1.0 : -1.0;
    }
  const auto times = [&](const float* M, const Four* from, auto&& take) {
    for (int i = 0; i < s.d; ++i) {
      Four t[2] = {};
      int k = 0;
      for (; k + 2 <= s.d; k += 2) {
        t[0] += from[k] * static_cast<double>(M[i * Stride + k]);
        t[1] += from[k + 1] * static_cast<double>(M[i * Stride + k + 1]);
      }
      if (k < s.d) t[0] += from[k] * static_cast<double>(M[i * Stride + k]);
      take(i, t[0] + t[1]);
    }
  };
  times(X, z, [&](int i, Four v) { y[i] = v; });
  times(A, y, [&](int i, Four v) {
    const Four r = z[i] - v;
    total += r * r;
  });
  return __builtin_sqrt((total[0] + total[1] + total[2] + total[3]) / 4);
}

// The state of one chain.
template <int Stride>
struct Chain {
  const AdaptiveArgs& a;
  Square<Stride> s;
  SchulzMatrices m;
  Norms norm_a;
  double residual = 0;  // ||R||_F
  int64_t products = 0, steps = 0;

  const float* polynomial(int64_t i) const { return a.menu + i * kMenuColumns; }
  bool affords(int64_t count) const { return products + count <= a.budget; }

  void form_residual() {
    s.product(-1, m.A, m.X, m.R, Term{1, m.I});
    residual = frobenius(s, m.R);
    ++products;
  }

  // X p(R) of a polynomial of the menu, R being formed
  void apply(const float* p) {
    const int64_t degree = static_cast<int64_t>(p[0]);
    const float* coefficients = p + kMenuColumns - kCoefficients;
    if (degree == 2) {
      s.product(coefficients[1], m.X, m.R, m.P, Term{coefficients[0], m.X});
      ++products;
    } else {
      step_factor(s, degree, coefficients, false, m);
      s.product(1, m.X, m.Z, m.P);
      products += cost(degree);
    }
    float* const last = m.X;
    m.X = m.P;
    m.P = last;
    ++steps;
  }

  // products of a step whose R is there
  static int64_t cost(int64_t degree) { return degree == 9 ? 4 : degree == 5 ? 3 : degree - 1; }

  // The first step from X = start I: neither R nor X Z is a product.
  void first(float start) {
    s.combine(m.X, Term{start, m.I});
    s.combine(m.R, Term{1, m.I}, Term{-start, m.A});
    residual = frobenius(s, m.R);
  }

  void widen_first(float start) {
    step_factor(s, 9, polynomial(0) + kMenuColumns - kCoefficients, true, m);
    s.combine(m.X, Term{start, m.Z});
    products += 3;
    ++steps;
  }

  // The polynomial of least cost to `target`, weighed by what each leaves: `after` products.
  template <class After>
  const float* cheapest(double e, const After& after) const {
    const float* best = nullptr;
    double least = 1e30;
    for (int64_t i = 1; i < a.polynomials; ++i) {
      const float* p = polynomial(i);
      if (p[1] < e && i + 4 < a.polynomials) continue;  // made for a smaller radius
      if (best != nullptr && p[1] > best[1]) break;
      const double total = static_cast<double>(cost(static_cast<int64_t>(p[0]))) + after(p);
      if (total < least) best = p, least = total;
    }
    return best;
  }
};

// Runs the chain until R is small enough for `done`; false where it does not get there. X and R of
// it are left in place.
template <int Stride, class Done, class After>
static inline bool contract(Chain<Stride>& c, float start, const Done& done, const After& after) {
  const AdaptiveArgs& a = c.a;
  int widened = 0;
  if (a.scheduled) {
    run_schedule(c.s, c.m, start, a.degrees, a.coefficients, a.steps);
    c.steps = a.steps;
    for (int64_t k = 0; k < a.steps; ++k)
      c.products += Chain<Stride>::cost(a.degrees[k]) + (k == 0 ? -1 : 1);
    if (!c.affords(1)) return false;
    c.form_residual();
  } else {
    c.first(start);
    if (!(c.residual < kKnownBelow)) {
      if (!c.affords(4)) return false;
      c.widen_first(start);
      c.form_residual();
      ++widened;
    }
  }
  double last = 1e30;
  for (;;) {
    if (!(c.residual < 1e6)) return false;
    double e = c.residual;
    if (e >= kKnownBelow) {
      e = kMargin * radius(c.s, c.m.R, c.m.P, c.m.Q);
      if (!(e < kResolved)) {
        if (++widened > kMostWidening || !c.affords(5)) return false;
        c.apply(c.polynomial(0));
        c.form_residual();
        continue;
      }
    }
    if (done(c, e)) return true;
    // at rest: what a contraction leaves is rounding
    if (c.residual > last / 2) return c.residual < 0.5;
    last = c.residual < kKnownBelow ? c.residual : 1e30;
    const float* p = c.cheapest(e, after);
    if (!c.affords(Chain<Stride>::cost(static_cast<int64_t>(p[0])) + 2)) return false;
    c.apply(p);
    c.form_residual();
  }
}

template <int Stride>
static inline void adaptive_inverse(Chain<Stride>& c, float start, float scale) {
  const AdaptiveArgs& a = c.a;
  const Square<Stride>& s = c.s;
  SchulzMatrices& m = c.m;
  const double root = __builtin_sqrt(static_cast<double>(a.d)), gamma = (a.d + 4) * kRoundoff;
  const double goal = a.goal * root;
  const auto product_size = [&](const Norms& x) {
    const double one = c.norm_a.frobenius * x.rows, other = c.norm_a.rows * x.frobenius;
    const double both = c.norm_a.frobenius * x.frobenius;
    return one < other ? (one < both ? one : both) : (other < both ? other : both);
  };
  double rest = 0;
  bool enough = false;
  const auto done = [&](Chain<Stride>& chain, double e) {
    const Norms x = norms(s, chain.m.X);
    rest = kRoundoff * c.norm_a.frobenius * x.frobenius;
    // a coarse goal may be met by R itself
    enough = goal > 0 && c.residual + gamma * product_size(x) <= goal;
    const double needed = goal > 0 && goal / 2 > rest ? goal / 2 : rest;
    return enough || (e < kKnownBelow && c.residual * c.residual <= needed);
  };
  // plain steps that are left before the last one, at two products each
  const auto after = [&](const float* p) {
    const double needed = goal > 0 && goal / 2 > rest ? goal / 2 : rest;
    double left = p[2] * root * 0.7, total = 0;
    for (; left * left > needed && total < 12; total += 2) left = left < 1 ? left * left : left;
    return total;
  };
  const bool reached = contract(c, start, done, after);
  const Norms before = norms(s, m.X);
  const double E = c.residual;
  double bound = (E + gamma * product_size(before)) / root;
  const bool last_step = reached && !enough && c.affords(1);
  if (last_step) {
    s.product(1, m.X, m.R, m.P, Term{1, m.X});
    float* const last = m.X;
    m.X = m.P;
    m.P = last;
    ++c.products, ++c.steps;
  }
  const Norms x = norms(s, m.X);
  if (last_step)
    bound = (E * E + (1 + E) * gamma * product_size(before) +
             c.norm_a.frobenius * (kRoundoff * x.frobenius + gamma * before.frobenius * E)) /
            root;
  // the norms themselves are sums in float
  bound *= 1 + 4 * gamma;
  const double floor = 16 * kRoundoff * c.norm_a.rows * x.rows;
  a.facts[3] = floor < kLargestFloor ? floor : kLargestFloor;
  a.facts[1] = reached && bound < 1e30 ? bound : __builtin_inf();
  a.facts[2] = kBound;
  const double limit = a.goal > 0 ? a.goal : a.facts[3];
  if (a.certify && reached && !(a.facts[1] <= limit)) {
    a.facts[1] = probed(s, m.A, m.X) / root;
    a.facts[2] = kEstimate;
  }
  const float unit = 1 / scale;
  Vec nothing{};
  for (int i = 0; i < a.d; ++i) {
    float* to = a.result + static_cast<int64_t>(i) * a.d;
    int j = 0;
    for (; j + kLanes <= a.d; j += kLanes) {
      const Vec v = load(m.X + i * Stride + j) * unit;
      nothing += 0.0f * v;
      store(to + j, v);
    }
    for (; j < a.d; ++j) {
      to[j] = m.X[i * Stride + j] * unit;
      nothing[0] += 0.0f * to[j];
    }
  }
  if (sum(nothing) != 0) a.facts[1] = __builtin_inf();
}

// E = V - W A for a few rows in double; returns ||E||_F^2. W, E, V are rows of Stride doubles.
template <int Stride>
static inline double thin_residual(int d, int rows, const double* A, const double* V,
                                   const double* W, double* E) {
  using Wide = Simd<double>::Vec;
  constexpr int lanes = Simd<double>::lanes;
  Wide total{};
  for (int j = 0; j < d; j += lanes) {
    Wide t[kThinRows];
    for (int p = 0; p < rows; ++p) t[p] = load(V + p * Stride + j);
    for (int k = 0; k < d; ++k) {
      const Wide row = load(A + k * Stride + j);
      for (int p = 0; p < rows; ++p) t[p] -= row * W[p * Stride + k];
    }
    for (int p = 0; p < rows; ++p) {
      store(E + p * Stride + j, t[p]);
      total += t[p] * t[p];
    }
  }
  double square = 0;
  for (int l = 0; l < lanes; ++l) square += total[l];
  return square;
}

// W += E X^T in float, for X^T in rows.
template <int Stride>
static inline void thin_step(int width, int d, int rows, const float* XT, const double* E,
                             double* W) {
  for (int j = 0; j < width; j += kLanes) {
    Vec t[kThinRows] = {};
    for (int k = 0; k < d; ++k) {
      const Vec row = load(XT + k * Stride + j);
      for (int p = 0; p < rows; ++p) t[p] += row * static_cast<float>(E[p * Stride + k]);
    }
    for (int p = 0; p < rows; ++p)
      for (int l = 0; l < kLanes; ++l) W[p * Stride + j + l] += static_cast<double>(t[p][l]);
  }
}

template <int Stride>
static inline void adaptive_solve(Chain<Stride>& c, float start, float scale) {
  const AdaptiveArgs& a = c.a;
  const Square<Stride>& s = c.s;
  SchulzMatrices& m = c.m;
  const int d = a.d, rows = static_cast<int>(a.n_queries);
  const double goal = a.goal > 0 ? a.goal : 2 * kRoundoff;
  // a thin step costs a product in double and one in float
  const double thin = 3.0 * rows / d;
  const double log_goal = __builtin_log(goal / 8);
  const auto steps_from = [&](double log_e) {
    return log_e <= log_goal ? 1.0 : __builtin_ceil(log_goal / log_e);
  };
  const float* last_step = nullptr;
  const auto after = [&](const float* p) { return thin * steps_from(p[3]); };
  const auto done = [&](Chain<Stride>& chain, double e) {
    last_step = chain.cheapest(e, after);
    const double dense = Chain<Stride>::cost(static_cast<int64_t>(last_step[0])) + after(last_step);
    if (e == 0 || thin * steps_from(__builtin_log(e)) <= dense) last_step = nullptr;
    return true;
  };
  bool reached = contract(c, start, done, after);
  if (reached && last_step != nullptr) c.apply(last_step);
  // A in double and X^T in float lie where the steps of the chain lay
  double* const wide = reinterpret_cast<double*>(m.Z);  // Z and R
  float* const XT = m.Q;
  turn(s, m.X, XT);
  const auto widen = [&] {
    for (int i = 0; i < d; ++i)
      for (int j = 0; j < Stride; ++j) wide[i * Stride + j] = j < d ? m.A[i * Stride + j] : 0.0;
  };
  widen();
  double V[kThinRows * Stride], W[kThinRows * Stride], E[kThinRows * Stride];
  double size = 0, missed = 0, solved = 0;
  int64_t most = 0;
  int dense = 0;
  for (int64_t first = 0; first < a.n_queries; first += kThinRows) {
    const int count = static_cast<int>(smaller(kThinRows, a.n_queries - first));
    float top = 0;
    for (int p = 0; p < count; ++p)
      for (int j = 0; j < d; ++j) {
        const float v = a.queries[(first + p) * d + j], v_size = v < 0 ? -v : v;
        top = v_size > top ? v_size : top;
      }
    int power = 0;
    (void)__builtin_frexpf(top, &power);
    const double unit = __builtin_ldexp(1.0, -power);
    double square = 0;
    for (int p = 0; p < count; ++p)
      for (int j = 0; j < Stride; ++j) {
        const double v = j < d ? a.queries[(first + p) * d + j] * unit : 0.0;
        V[p * Stride + j] = E[p * Stride + j] = v;
        W[p * Stride + j] = 0;
        square += v * v;
      }
    double best = 1e300, now = square;
    int64_t done_steps = 0;
    while (reached && done_steps < kThinSteps && now > square * goal * goal / 16) {
      if (!(now < best / 4)) {
        // at rest, or X is too coarse, which a dense step mends
        if (now <= 1e-26 * square || dense == kMostDense || !c.affords(2)) break;
        ++dense;
        c.form_residual();
        s.product(1, m.X, m.R, m.P, Term{1, m.X});
        float* const last = m.X;
        m.X = m.P;
        m.P = last;
        ++c.products, ++c.steps;
        turn(s, m.X, XT);
        widen();
      }
      best = now;
      thin_step<Stride>(s.width, d, count, XT, E, W);
      now = thin_residual<Stride>(d, count, wide, V, W, E);
      ++done_steps;
    }
    most = done_steps > most ? done_steps : most;
    // what is delivered is rounded
    double out_size = 0;
    const double back = __builtin_ldexp(1.0, power) / scale;
    for (int p = 0; p < count; ++p)
      for (int j = 0; j < d; ++j) {
        const float w = static_cast<float>(W[p * Stride + j] * back);
        a.result[(first + p) * d + j] = w;
        W[p * Stride + j] = w / back;
        out_size += W[p * Stride + j] * W[p * Stride + j];
      }
    if (a.certify || !(now <= square * goal * goal))
      now = thin_residual<Stride>(d, count, wide, V, W, E);
    // in the units of the caller's V, whose rows differ in size from group to group
    const double restore = __builtin_ldexp(1.0, 2 * (power < 500 ? power : 500));
    size += square * restore, missed += now * restore, solved += out_size * restore;
  }
  c.steps += most;
  const double norm = size > 0 ? __builtin_sqrt(size) : 1;
  const double floor = 16 * kRoundoff * (1 + c.norm_a.rows * __builtin_sqrt(solved) / norm);
  a.facts[3] = floor < kLargestFloor ? floor : kLargestFloor;
  const double residual = __builtin_sqrt(missed) / norm;
  a.facts[1] = reached && residual < 1e30 ? residual : __builtin_inf();
  a.facts[2] = kMeasured;
}

template <int Stride>
static inline void adaptive(const AdaptiveArgs& a) {
  const int64_t each = static_cast<int64_t>((a.d + 3) / 4 * 4) * Stride;
  const auto at = [&](int i) { return a.scratch + i * each; };
  Chain<Stride> c{a,
                  {a.d, (a.d + kLanes - 1) / kLanes * kLanes},
                  {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)},
                  {}};
  for (int i = 0; i < kFacts; ++i) a.facts[i] = 0;
  float scale = 1;
  if (!read_matrix(a, c.s, c.m.A, c.m.R, &scale)) return;
  a.facts[0] = 1;
  for (int i = 0; i < a.d; ++i)
    for (int j = 0; j < c.s.width; ++j) c.m.I[i * Stride + j] = i == j ? 1.0f : 0.0f;
  c.norm_a = norms(c.s, c.m.A);
  double top = c.norm_a.rows < c.norm_a.frobenius ? c.norm_a.rows : c.norm_a.frobenius, trace = 0;
  for (int i = 0; i < a.d; ++i) trace += c.m.A[i * Stride + i];
  top = (top < trace ? top : trace) * (1 + 4 * a.d * kRoundoff);
  const float start = a.scheduled ? a.start : static_cast<float>(1 / top);
  if (a.queries != nullptr)
    adaptive_solve(c, start, scale);
  else
    adaptive_inverse(c, start, scale);
  a.facts[4] = static_cast<double>(c.products);
  a.facts[5] = static_cast<double>(c.steps);
}

static void schulz_adaptive(const AdaptiveArgs& a) {
  if (a.d <= 16)
    adaptive<16>(a);
  else if (a.d <= 32)
    adaptive<32>(a);
  else if (a.d <= 64)
    adaptive<64>(a);
  else
    adaptive<kMaxSide>(a);
}

}  // namespace hyperinf::HYPERINF_ISA
