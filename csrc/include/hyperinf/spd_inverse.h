// Inverse of kLanes symmetric positive definite matrices at once, one per SIMD lane.
//
// Cholesky A = L L^T, then M = L^-1, then A^-1 = M^T M, all in place on the lower triangle in 4 x 4
// tiles. A lane never reads another, so a matrix that fails spoils only itself.
#pragma once

#include "hyperinf/pack.h"

namespace hyperinf::HYPERINF_ISA {

constexpr int kT = 4;  // tile side; matrices are padded to it with the identity

// Lower triangle of tiles: row i holds the columns up to the end of its own tile.
struct Triangle {
  Vec* rows[kMaxSide];
  Triangle(Vec* data, int padded) {
    for (int i = 0; i < padded; ++i, data += i % kT == 0 ? i * kT : 0)
      rows[i] = data + (i % kT) * (i / kT + 1) * kT;
  }
  Vec* row(int i) const { return rows[i]; }
};

using Lanes = int32_t __attribute__((vector_size(4 * HYPERINF_LANES)));

struct Tile {
  Vec v[kT][kT] = {};

  // += sum_k x_r[k] y_c[k], both read along rows: the update of Cholesky.
  void add_rows(const Triangle& x, int x_row, const Triangle& y, int y_row, int count) {
    const Vec *a[kT], *b[kT];
    for (int r = 0; r < kT; ++r) a[r] = x.row(x_row + r), b[r] = y.row(y_row + r);
    for (int k = 0; k < count; ++k)
      for (int r = 0; r < kT; ++r)
        for (int c = 0; c < kT; ++c) v[r][c] += a[r][k] * b[c][k];
  }
};

static inline Vec root(Vec x) {
  float y[kLanes];
  store(y, x);
  for (int l = 0; l < kLanes; ++l) y[l] = __builtin_sqrtf(y[l]);
  return load(y);
}

// Cholesky of the lower triangle; info[l] = order of the first leading minor that is not positive.
static inline void cholesky(const Triangle& A, int padded, int d, Lanes& info) {
  for (int J = 0; J < padded; J += kT) {
    Vec inverse[kT];
    for (int I = J; I < padded; I += kT) {
      Tile t;
      t.add_rows(A, I, A, J, J);
      for (int r = 0; r < kT; ++r)
        for (int c = 0; c < kT; ++c) t.v[r][c] = A.row(I + r)[J + c] - t.v[r][c];
      for (int c = 0; c < kT; ++c) {
        const Vec* pivot_row = A.row(J + c) + J;
        for (int r = I == J ? c : 0; r < kT; ++r) {
          const Vec* left = A.row(I + r) + J;
          for (int k = 0; k < c; ++k) t.v[r][c] -= left[k] * pivot_row[k];
          if (I == J && r == c) {
            const Lanes bad = t.v[r][c] > 0 ? Lanes{} : Lanes{} + (J + c + 1);
            if (J + c < d) info = info == 0 ? bad : info;
            A.row(J + c)[J + c] = root(t.v[r][c]);
            inverse[c] = broadcast(1.0f) / A.row(J + c)[J + c];
          } else {
            A.row(I + r)[J + c] = t.v[r][c] * inverse[c];
          }
        }
        // tiles on the diagonal are read whole by what follows
        if (I == J)
          for (int r = 0; r < c; ++r) A.row(J + r)[J + c] = Vec{};
      }
    }
  }
}

// L becomes M = L^-1, four rows at a time: L M = I read from the top.
static inline void invert_factor(const Triangle& A, int padded, Vec* spare) {
  for (int I = 0; I < padded; I += kT) {
    const int width = I + kT;
    for (int r = 0; r < kT; ++r)
      for (int k = 0; k < width; ++k) spare[r * width + k] = A.row(I + r)[k];
    Vec inverse[kT];
    for (int r = 0; r < kT; ++r) inverse[r] = broadcast(1.0f) / spare[r * width + I + r];
    for (int J = 0; J <= I; J += kT) {
      Tile t;
      for (int k = J; k < I; ++k) {
        const Vec* m = A.row(k) + J;
        for (int r = 0; r < kT; ++r)
          for (int c = 0; c < kT; ++c) t.v[r][c] += spare[r * width + k] * m[c];
      }
      for (int r = 0; r < kT; ++r)
        for (int c = 0; c < kT; ++c) {
          Vec x = (I == J && r == c ? broadcast(1.0f) : Vec{}) - t.v[r][c];
          for (int s = 0; s < r; ++s) x -= spare[r * width + I + s] * t.v[s][c];
          t.v[r][c] = x * inverse[r];
        }
      for (int r = 0; r < kT; ++r)
        for (int c = 0; c < kT; ++c) A.row(I + r)[J + c] = t.v[r][c];
    }
  }
}

// M becomes the lower triangle of M^T M; row block I needs M's rows from I on, so it goes first.
static inline void square_factor(const Triangle& A, int padded, Vec* spare) {
  for (int I = 0; I < padded; I += kT) {
    const int width = I + kT;
    for (int r = 0; r < kT; ++r)
      for (int k = 0; k < width; ++k) spare[r * width + k] = A.row(I + r)[k];
    for (int J = 0; J <= I; J += kT) {
      Tile t;
      const auto add = [&](const Vec* m) {
        for (int r = 0; r < kT; ++r)
          for (int c = 0; c < kT; ++c) t.v[r][c] += m[I + r] * m[J + c];
      };
      for (int k = 0; k < kT; ++k) add(spare + k * width);
      for (int k = I + kT; k < padded; ++k) add(A.row(k));
      for (int r = 0; r < kT; ++r)
        for (int c = 0; c < kT; ++c) A.row(I + r)[J + c] = t.v[r][c];
    }
  }
}

// to[j] = columns [first, last) of row i, element j of matrix l in lane l.
static inline void read_row(const LanesArgs& a, int i, int first, int last, Vec* to) {
  const float* const from = a.matrices + i * a.row_stride;
  const int64_t s = a.matrix_stride;
  int64_t l = 0;
  for (; l + 4 <= a.count; l += 4) {
    const float* m = from + l * s;
    int j = first;
    for (; j + 4 <= last; j += 4)
      transpose4<float>(load4<float>(m + j), load4<float>(m + s + j), load4<float>(m + 2 * s + j),
                        load4<float>(m + 3 * s + j), reinterpret_cast<float*>(to + j) + l, kLanes);
    for (; j < last; ++j)
      for (int q = 0; q < 4; ++q) to[j][l + q] = m[q * s + j];
  }
  for (; l < a.count; ++l)
    for (int j = first; j < last; ++j) to[j][l] = from[l * s + j];
}

// The lower triangle; lanes beyond `count` and the padding hold the identity.
static inline void read_lanes(const LanesArgs& a, const Triangle& A, int padded) {
  constexpr int64_t line = 16;
  for (int i = 0; i < padded; ++i) {
    Vec* row = A.row(i);
    if (a.count < kLanes || i >= a.d)
      for (int j = 0; j <= i; ++j) row[j] = broadcast(i == j ? 1.0f : 0.0f);
    if (i >= a.d) continue;
    read_row(a, i, 0, i + 1, row);
    // the next group comes from memory while this one is worked on
    for (int64_t l = a.count; l < a.count + a.ahead; ++l)
      for (int64_t j = 0; j < a.d; j += line)
        __builtin_prefetch(a.matrices + l * a.matrix_stride + i * a.row_stride + j);
  }
}

static inline Vec magnitude(Vec x) { return x < 0 ? -x : x; }
static inline Vec larger(Vec x, Vec y) { return x > y ? x : y; }

// -1 in the lanes of matrices that are not finite, or not symmetric to 1e-3 of their largest entry.
static inline Lanes unfit_lanes(const LanesArgs& a, const Triangle& A, Vec* upper) {
  Vec largest{}, skew{}, nothing{};  // nothing: 0 * every entry, NaN where one is not finite
  for (int i = 0; i < a.d; ++i) {
    read_row(a, i, i, a.d, upper);
    for (int j = i; j < a.d; ++j) {
      const Vec x = A.row(j)[i], y = upper[j], difference = x - y;
      nothing += 0.0f * x + 0.0f * y;
      largest = larger(larger(magnitude(x), magnitude(y)), largest);
      skew = larger(magnitude(difference), skew);
    }
  }
  return (nothing != 0) | (skew > 1e-3f * largest);
}

// -1 in the lanes of inverses that are not finite.
static inline Lanes overflown_lanes(const Triangle& A, int d) {
  Vec nothing{};
  for (int i = 0; i < d; ++i)
    for (int j = 0; j <= i; ++j) nothing += 0.0f * A.row(i)[j];
  return nothing != 0;
}

// Both triangles of every inverse; a matrix with info set gets NaN.
static inline void write_lanes(const LanesArgs& a, const Triangle& A) {
  constexpr int64_t line = 16;
  const int64_t area = static_cast<int64_t>(a.d) * a.d;
  for (int i = 0; i < a.d; ++i) {
    int64_t l = 0;
    const auto at = [&](int j) {
      return reinterpret_cast<const float*>(j <= i ? A.row(i) + j : A.row(j) + i);
    };
    for (; l + 4 <= a.count; l += 4) {
      float* out = a.inverses + l * area + static_cast<int64_t>(i) * a.d;
      int j = 0;
      for (; j + 4 <= a.d; j += 4)
        transpose4<float>(load4<float>(at(j) + l), load4<float>(at(j + 1) + l),
                          load4<float>(at(j + 2) + l), load4<float>(at(j + 3) + l), out + j, area);
      for (; j < a.d; ++j)
        for (int q = 0; q < 4; ++q) out[q * area + j] = at(j)[l + q];
    }
    for (; l < a.count; ++l)
      for (int j = 0; j < a.d; ++j)
        a.inverses[l * area + static_cast<int64_t>(i) * a.d + j] = at(j)[l];
    for (l = a.count; l < a.count + a.ahead; ++l)
      for (int64_t j = 0; j < a.d; j += line)
        __builtin_prefetch(a.inverses + l * area + i * a.d + j, 1);
  }
  for (int64_t l = 0; l < a.count; ++l)
    if (a.info[l] > 0)
      for (int64_t e = 0; e < area; ++e) a.inverses[l * area + e] = __builtin_nanf("");
}

static void spd_inverse_lanes(const LanesArgs& a) {
  const int padded = (a.d + kT - 1) / kT * kT;
  Vec* const spare = reinterpret_cast<Vec*>(a.scratch);
  const Triangle A(spare + kT * padded, padded);
  Lanes info{};
  read_lanes(a, A, padded);
  const Lanes unfit = a.check ? unfit_lanes(a, A, spare) : Lanes{};
  cholesky(A, padded, a.d, info);
  invert_factor(A, padded, spare);
  square_factor(A, padded, spare);
  if (a.check) info = info == 0 ? unfit | overflown_lanes(A, a.d) : info;
  for (int64_t l = 0; l < a.count; ++l) a.info[l] = info[l];
  write_lanes(a, A);
}

}  // namespace hyperinf::HYPERINF_ISA
