// hyperinf::matrix_norms on CPU: what the tests and bounds of an inverse need to know of a matrix,
// in one reading.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <limits>

#include "cpu/checks.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace hyperinf {

using torch::stable::Tensor;

namespace {

constexpr int64_t kPanel =
    32;  // rows of one item; blocks of kPanel x kPanel meet their mirror in cache
constexpr int64_t kNorms = 6;

// Of the rows [first, last) of one matrix; out: largest |a|, largest |a - a^T|, least diagonal
// entry, trace, sum of squares, largest row sum.
template <class T>
void panel_norms(const T* a, int64_t d, int64_t row, int64_t column, int64_t first, int64_t last,
                 double* out) {
  constexpr int kSums = 8;
  T largest = 0, skew = 0, nothing = 0;  // nothing: 0 * every entry, NaN where one is not finite
  double square = 0, trace = 0, most = 0, least = std::numeric_limits<double>::infinity();
  for (int64_t i = first; i < last; ++i) {
    const T* p = a + i * row;
    double total = 0;
    for (int64_t begin = 0; begin < d; begin += 256) {  // short sums in T, added in double
      const int64_t end = std::min(d, begin + 256);
      T top[kSums] = {}, sum[kSums] = {}, squares[kSums] = {}, zero[kSums] = {};
      int64_t j = begin;
      if (column == 1)
        for (; j + kSums <= end; j += kSums)
          for (int q = 0; q < kSums; ++q) {
            const T x = p[j + q], size = x < 0 ? -x : x;
            zero[q] += x * 0;
            top[q] = size > top[q] ? size : top[q];
            sum[q] += size;
            squares[q] += x * x;
          }
      for (; j < end; ++j) {
        const T x = p[j * column], size = x < 0 ? -x : x;
        zero[0] += x * 0;
        top[0] = size > top[0] ? size : top[0];
        sum[0] += size;
        squares[0] += x * x;
      }
      for (int q = 0; q < kSums; ++q) {
        nothing += zero[q];
        largest = top[q] > largest ? top[q] : largest;
        total += sum[q];
        square += squares[q];
      }
    }
    most = std::max(most, total);
    const double diagonal = p[i * column];
    trace += diagonal;
    least = std::min(least, diagonal);
  }
  for (int64_t block = first; block < d; block += kPanel)
    for (int64_t i = first; i < last; ++i)
      for (int64_t j = std::max(block, i + 1); j < std::min(d, block + kPanel); ++j) {
        const T gap = a[i * row + j * column] - a[j * row + i * column],
                size = gap < 0 ? -gap : gap;
        skew = size > skew ? size : skew;
      }
  const double found[kNorms] = {largest, skew, least, trace, square, most};
  for (int64_t k = 0; k < kNorms; ++k)
    out[k] = nothing == 0 ? found[k] : std::numeric_limits<double>::quiet_NaN();
}

Tensor matrix_norms(const Tensor& A) {
  check_dims("A", A, 3);
  if (!is_double(A)) check_float("A", A);
  const int64_t batch = A.size(0), d = A.size(1);
  STD_TORCH_CHECK(A.size(2) == d, "A must hold square matrices, got ", d, " x ", A.size(2));
  STD_TORCH_CHECK(d < int64_t{1} << 24, "A is too large");
  Tensor norms = new_output("A", A, {batch, kNorms}, torch::headeronly::ScalarType::Double);
  const int64_t panels = std::max<int64_t>(1, (d + kPanel - 1) / kPanel);
  const int64_t items = checked_product("A", {batch, panels});
  const auto parts = aligned<double>(checked_product("A", {std::max<int64_t>(1, items), kNorms}));
  for_each_item(items, [&](int64_t item, int64_t) {
    const int64_t b = item / panels, first = item % panels * kPanel;
    const int64_t last = std::min(d, first + kPanel);
    const auto run = [&](auto* a) {
      panel_norms(a + b * A.stride(0), d, A.stride(1), A.stride(2), first, last,
                  parts.get() + item * kNorms);
    };
    if (is_double(A))
      run(static_cast<const double*>(A.const_data_ptr()));
    else
      run(static_cast<const float*>(A.const_data_ptr()));
  });
  auto* out = static_cast<double*>(norms.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    double* to = out + b * kNorms;
    const double* from = parts.get() + b * panels * kNorms;
    for (int64_t k = 0; k < kNorms; ++k) to[k] = from[k];
    for (int64_t q = 1; q < panels; ++q) {
      const double* next = from + q * kNorms;
      const double both[kNorms] = {std::max(to[0], next[0]), std::max(to[1], next[1]),
                                   std::min(to[2], next[2]), to[3] + next[3],
                                   to[4] + next[4],          std::max(to[5], next[5])};
      // a sum with NaN is NaN, a comparison need not be
      const bool finite = !std::isnan(to[3]) && !std::isnan(next[3]);
      for (int64_t k = 0; k < kNorms; ++k) to[k] = finite ? both[k] : both[3];
    }
  }
  return norms;
}

}  // namespace

}  // namespace hyperinf

STABLE_TORCH_LIBRARY_IMPL(hyperinf, CPU, m) {
  m.impl("matrix_norms", TORCH_BOX(&hyperinf::matrix_norms));
}
