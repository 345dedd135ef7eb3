// The kernels as the bindings see them: plain pointers, one table per instruction set.
#pragma once

#include <cstdint>
#include <span>

namespace hyperinf {

enum class RowType { kFloat, kBf16, kDouble };

// One slab of training rows for a few queries of `sherman_morrison`.
struct SlabArgs {
  const void* rows;  // (count, columns), unit column stride
  RowType type;
  int64_t row_stride;
  int64_t count;
  int64_t columns;
  const float* queries;  // (n_queries, columns), contiguous
  int64_t n_queries;     // at most kMaxQueries
  float damping;
  float* spare;  // (n_queries, columns) where rows are bf16
  float* total;  // (n_queries, columns): sum over rows of (v . g) / (damping + g . g) g
};
constexpr int64_t kMaxQueries = 16;

// Dot products of a few rows with all queries, and the rows' squared norms, added to fp64 sums.
struct DotArgs {
  const void* rows;  // (count, columns), unit column stride
  RowType type;
  int64_t row_stride;
  int64_t count;  // at most kDotRows
  int64_t columns;
  int64_t ahead;         // columns that follow in memory and are wanted soon, these included
  const float* queries;  // (n_queries, columns) in blocks of kQueryBlock columns, one after another
  int64_t n_queries;
  double* dots;   // (count, n_queries), contiguous
  double* norms;  // (count), or null: not wanted
};
constexpr int64_t kQueryBlock = 256;
constexpr int64_t kDotRows = 12;
constexpr int kDotDepth = 26;  // roundings of fp32 between a product and the fp64 sum it is in

// Rows summed with weights over a slice of their columns, added to fp64 sums.
struct SumArgs {
  const void* rows;  // (count, columns), unit column stride
  RowType type;
  int64_t row_stride;
  int64_t count;
  int64_t columns;       // at most kSliceColumns
  const float* weights;  // (count, n_queries), contiguous
  int64_t n_queries;
  float* panel;    // scratch of kPanelFloats
  float* partial;  // scratch of as many floats as `total` has numbers
  double* total;   // (n_queries, kSliceColumns)
};
constexpr int64_t kSliceColumns = 1024;
constexpr int64_t kPanelRows = 32;
constexpr int kPanels = 8;
constexpr int kSumDepth = static_cast<int>(kPanelRows) + kPanels - 1;
constexpr int64_t kPanelFloats = (kPanelRows + 1) * kSliceColumns;

// One tile of X Y^T over one chunk of the depth, both operands with any strides.
struct GramArgs {
  RowType type;
  const void* x;  // (rows, depth)
  int64_t x_row_stride;
  int64_t x_depth_stride;
  const void* y;  // (cols, depth)
  int64_t y_row_stride;
  int64_t y_depth_stride;
  int64_t rows;
  int64_t cols;
  int64_t depth;
  bool diagonal;  // x is y: only entries on or above the diagonal are wanted
  void* tile;     // (kGramTile, kGramTile) floats or doubles, written
  void* panels;   // scratch of kGramPanels floats or doubles
};
constexpr int64_t kGramRowGroup = 12;  // rows of a tile are written in groups of a divisor of it
// tile and depth of the packed panels, which stay in cache: for sums in float, in double
template <class Acc>
constexpr int64_t kGramTile = 384;
template <>
inline constexpr int64_t kGramTile<double> = 192;
template <class Acc>
constexpr int64_t kGramDepth = 192;
template <>
inline constexpr int64_t kGramDepth<double> = 128;
// A run of fp32 products before fp64 takes over: a chain of kGramDepth additions and these four
// sums.
constexpr int64_t kGramRun = 4 * kGramDepth<float>;
template <class Acc>
constexpr int64_t kGramPanels = 2 * kGramTile<Acc> * kGramDepth<Acc>;

// Rows as a few probes see them, in double.
constexpr int kSketchProbes = 4;
struct SketchArgs {
  const void* rows;  // (count, columns), unit column stride
  RowType type;      // kFloat or kBf16
  int64_t row_stride;
  int64_t count;
  int64_t columns;
  const double* probes;  // (count, kSketchProbes) to combine rows, (kSketchProbes, columns) else
  double* out;           // (kSketchProbes, columns) at `stride`, added to
  int64_t stride;
};

// A slice of the columns of rows: its sums with weights, or its dot products with those sums.
struct SeenArgs {
  const void* rows;  // (count, columns), unit column stride
  RowType type;      // kFloat or kBf16
  int64_t row_stride;
  int64_t count;
  int64_t columns;
  const double* weights;  // (count, kSketchProbes)
  double* total;          // (kSketchProbes, columns), added to where there are no dots
  int64_t total_stride;
  double* dots;  // (count, kSketchProbes), added to, or null
};

// thin^T wide of one sample: the gradient of a layer with one thin side.
struct ThinArgs {
  RowType type;
  const void* thin;  // (tokens, thin_columns), unit column stride
  int64_t thin_stride;
  int64_t thin_columns;  // at most kMostThin
  const void* wide;      // (tokens, wide_columns), unit column stride
  int64_t wide_stride;
  int64_t wide_columns;  // at most kThinColumns
  int64_t tokens;
  float* out;  // (kMostThin, kThinColumns), written
};
constexpr int64_t kMostThin = 16;
constexpr int64_t kThinColumns = 1024;

// All Schulz steps of one matrix, X = start I at first.
struct SchulzArgs {
  const float* matrix;  // (d, d), any strides
  int64_t row_stride;
  int64_t column_stride;
  int d;
  float start;
  const int64_t* degrees;     // (steps): 2, 3, 5 or 9
  const float* coefficients;  // (steps, kCoefficients) in the order of the schedule
  int64_t steps;
  float* result;   // (d, d), contiguous
  float* scratch;  // kSchulzBuffers padded matrices, aligned to 64 bytes
};
constexpr int64_t kCoefficients = 8;
constexpr int64_t kSchulzBuffers = 9;

// One polynomial of `menu` (ops/schedule.py): its degree, the spectral radius of I - A X that it is
// made for, what it leaves of it, the logarithm of that, and its coefficients.
constexpr int64_t kMenuColumns = 4 + kCoefficients;

// A Schulz inverse or solve of one matrix that finds its own steps, and what is known of it.
struct AdaptiveArgs {
  const float* matrix;  // (d, d), any strides
  int64_t row_stride;
  int64_t column_stride;
  int d;
  bool scheduled;  // a chain for given bounds of the spectrum goes first
  float start;
  const int64_t* degrees;
  const float* coefficients;
  int64_t steps;
  const float* menu;  // (polynomials, kMenuColumns); the first one widens what converges
  int64_t polynomials;
  double goal;           // residual to reach; 0: as small as rounding allows
  int64_t budget;        // products
  bool certify;          // the result's residual is wanted
  const float* queries;  // (n_queries, d), contiguous, or null for the inverse
  int64_t n_queries;
  float* result;   // (d, d) or (n_queries, d), contiguous
  double* facts;   // kFacts numbers
  float* scratch;  // kSchulzBuffers matrices with rows up to a multiple of 4, aligned to 64 bytes
};
constexpr int64_t kFacts = 6;  // fit, residual, how it is known, floor, products, steps
enum Known : int { kNothing, kBound, kEstimate, kMeasured };  // as in ops/solve.py
constexpr int64_t kThinRows = 4;

// One group of symmetric positive definite matrices, at most one per lane.
struct LanesArgs {
  const float* matrices;  // (count, d, d), unit column stride; the lower triangle is read
  int64_t matrix_stride;
  int64_t row_stride;
  int64_t count;
  int64_t ahead;  // matrices of the next group, which follow these: fetched meanwhile
  int d;
  bool check;       // also read the upper triangle
  float* inverses;  // (count, d, d), contiguous
  int32_t* info;    // (count), LAPACK's: 0, or the order of the first minor that is not positive;
                    // -1 from a check: not symmetric, or not finite before or after
  float* scratch;   // aligned to 64 bytes
};
constexpr int64_t kMaxSide = 128;

struct Kernels {
  int64_t lanes;
  void (*sherman_morrison_slab)(const SlabArgs&);
  void (*dot_block)(const DotArgs&);
  void (*sum_slice)(const SumArgs&);
  void (*gram_tile)(const GramArgs&);    // sums in float, rows fp32 or bf16
  void (*gram_tile64)(const GramArgs&);  // sums in double, rows fp32, bf16 or fp64
  void (*combine_rows)(const SketchArgs&);
  void (*image_rows)(const SketchArgs&);
  void (*seen_slice)(const SeenArgs&);
  void (*thin_product)(const ThinArgs&);
  double (*block_dot)(const float* x, int64_t x_stride, const float* y, int64_t y_stride,
                      int64_t rows, int64_t columns);
  void (*schulz)(const SchulzArgs&);
  void (*schulz_adaptive)(const AdaptiveArgs&);
  void (*spd_inverse_lanes)(const LanesArgs&);
};

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernels* kernels;
};

std::span<const Isa> compiled_isas();  // best first

// The best table this processor runs, or the one HYPERINF_CPU_ISA names.
const Kernels& kernels();

}  // namespace hyperinf
