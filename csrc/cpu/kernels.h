// The kernels as the bindings see them: plain pointers, one table per instruction set.
#pragma once

#include <cstdint>
#include <span>

namespace hyperinf {

enum class RowType { kFloat, kBf16 };

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
  float* total;  // (n_queries, columns): sum over rows of (v . g) / (damping + g . g) g
};
constexpr int64_t kMaxQueries = 16;

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
  float* tile;    // (kGramTile, kGramTile), written
  float* panels;  // scratch of kGramPanels floats
};
constexpr int64_t kGramTile = 384;
constexpr int64_t kGramDepth = 192;  // depth of the packed panels, which stay in cache
constexpr int64_t kGramPanels = 2 * kGramTile * kGramDepth;

// One group of symmetric positive definite matrices, at most one per lane.
struct LanesArgs {
  const float* matrices;  // (count, d, d), unit column stride; the lower triangle is read
  int64_t matrix_stride;
  int64_t row_stride;
  int64_t count;
  int d;
  float* inverses;  // (count, d, d), contiguous
  int32_t* info;    // (count), LAPACK's: 0, or the order of the first minor that is not positive
  float* scratch;   // aligned to 64 bytes
};
constexpr int64_t kMaxSide = 128;

struct Kernels {
  int64_t lanes;
  void (*sherman_morrison_slab)(const SlabArgs&);
  void (*gram_tile)(const GramArgs&);
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
