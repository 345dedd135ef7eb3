// C += alpha sum_b g_b^T g_b from the factors of g_b = X_b^T Y_b, on the device. A block owns a
// tile of C: it forms the two strips of g_b that the tile needs in shared memory and multiplies
// them there, so no gradient is ever written. Strips are formed once per tile, which is worth it
// while the tokens are few (`prefer_fused_gfim` in ops/cuda.py).
#pragma once

#include <algorithm>

#include "hyperinf/per_sample.cuh"

namespace hyperinf::gpu {

struct Gfim {
  float* C;  // (cols, cols), any strides
  int64_t row_stride, col_stride;
  double alpha;    // may leave fp32's range, so it multiplies the sum
  int64_t splits;  // strips are shared out to this many blocks per tile
  float* partial;  // (splits, tiles, side, side) where splits > 1
};

constexpr int kStrip = 16;  // rows of g per strip

// Side of C's tiles, and how a strip of g is shared among the same threads.
struct SmallGfim {
  using Square = Tile<32, 32, 4, 4, 1>;
  using Strip = Tile<kStrip, 32, 2, 4, 1>;
};
struct LargeGfim {
  using Square = Tile<128, 128, 8, 8, 2>;
  using Strip = Tile<kStrip, 128, 2, 4, 1>;
};

template <class F>
void with_gfim(int64_t side, const F& f) {
  side <= 64 ? f(SmallGfim{}) : f(LargeGfim{});
}

struct GfimPlan {
  int64_t side, tiles, splits;

  int64_t partials() const { return splits > 1 ? splits * tiles * side * side : 0; }
};

// From the shape alone, so the order of summation never depends on the device.
inline GfimPlan gfim_plan(int64_t batch, int64_t rows, int64_t cols) {
  constexpr int64_t enough_blocks = 512, longest_run = 256;
  constexpr int64_t most_partials = int64_t{1} << 24;
  GfimPlan plan{};
  with_gfim(cols, [&](auto form) { plan.side = decltype(form)::Square::kM; });
  const int64_t across = parts(cols, plan.side), strips = batch * parts(rows, kStrip);
  plan.tiles = across * (across + 1) / 2;
  const int64_t area = plan.tiles * plan.side * plan.side;
  // long sums are cut too: their rounding grows with the run
  const int64_t wanted = std::max(parts(enough_blocks, plan.tiles), parts(strips, longest_run));
  plan.splits = std::clamp(std::min(wanted, most_partials / area), int64_t{1}, strips);
  return plan;
}

__device__ inline void add_to(float& entry, double alpha, double value) {
  entry = static_cast<float>(static_cast<double>(entry) + alpha * value);
}

// Tile number -> its row and column among the tiles on or above the diagonal.
__device__ inline void place_of(int64_t tile, int64_t across, int64_t& row, int64_t& col) {
  row = 0, col = tile;
  for (int64_t width = across; col >= width; --width) col -= width, ++row;
  col += row;
}

// The sum over the strips is fp32 whatever the factors are; their own product may be rounded.
template <class Mode>
using SumMode = std::conditional_t<std::is_same_v<Mode, Tf32>, Tf32, Scalar<float>>;

template <class Mode, class Form>
__global__ void __launch_bounds__(Form::Square::kThreads, 1)
    gfim_kernel(Factors<typename Mode::Element> f, bool wide_delta, bool wide_act, Gfim gfim) {
  using T = typename Mode::Element;
  using Square = typename Form::Square;
  using Strip = typename Form::Strip;
  static_assert(Square::kThreads == Strip::kThreads);
  constexpr int depth = kSlabDepth<T>, side = Square::kM, row_pitch = pitch<float>(side);
  using Sum = Product<SumMode<Mode>, Square, kStrip>;
  using Part = Product<Mode, Strip, depth>;
  struct Shared {
    Slabs<T, Strip, depth, false> slabs;
    alignas(128) float strips[2][kStrip * row_pitch];
    typename Sum::Stage stage;
  };
  HYPERINF_SHARED(Shared, shared);
  const int64_t across = parts(f.cols, side), tiles = across * (across + 1) / 2;
  const int64_t chunks = parts(f.rows, kStrip), strips = f.batch * chunks;
  const int64_t run = parts(strips, gfim.splits);
  for (int64_t item = blockIdx.x; item < gfim.splits * tiles; item += gridDim.x) {
    int64_t row, col;
    place_of(item % tiles, across, row, col);
    const int64_t first = item / tiles * run;
    const int64_t last = first + run < strips ? first + run : strips;
    Sum sum;
    sum.clear();
    for (int64_t strip = first; strip < last; ++strip) {
      const auto x = f.delta_of(strip / chunks, wide_delta);
      const auto y = f.act_of(strip / chunks, wide_act);
      const int64_t at = strip % chunks * kStrip;
      for (int which = 0; which < (row == col ? 1 : 2); ++which) {
        Part part;
        multiply<Mode, Strip, depth, false>(part, shared.slabs, x, at, y,
                                            (which == 0 ? row : col) * side);
        part.store(shared.strips[which], row_pitch);
      }
      __syncthreads();
      sum.step(shared.strips[0], shared.strips[row == col ? 0 : 1]);
      __syncthreads();
    }
    float* partial = gfim.partial + item * side * side;
    sum.visit(shared.stage, [&](int m, int n, float value) {
      const int64_t i = row * side + m, j = col * side + n;
      if (gfim.splits > 1) {
        partial[m * side + n] = value;
      } else if (i <= j && j < f.cols) {
        add_to(gfim.C[i * gfim.row_stride + j * gfim.col_stride], gfim.alpha, value);
        if (i < j) add_to(gfim.C[j * gfim.row_stride + i * gfim.col_stride], gfim.alpha, value);
      }
    });
  }
}

// C += alpha * the partial sums of its tile, in their order; a block takes one row of a tile.
template <class Form>
__global__ void __launch_bounds__(Form::Square::kN) gfim_sum_kernel(int64_t cols, Gfim gfim) {
  constexpr int side = Form::Square::kM;
  const int64_t across = parts(cols, side), tiles = across * (across + 1) / 2;
  for (int64_t item = blockIdx.x; item < tiles * side; item += gridDim.x) {
    int64_t row, col;
    place_of(item / side, across, row, col);
    const int64_t m = item % side, i = row * side + m, j = col * side + threadIdx.x;
    if (i > j || j >= cols) continue;
    double total = 0;
    for (int64_t split = 0; split < gfim.splits; ++split)
      total += gfim.partial[((split * tiles + item / side) * side + m) * side + threadIdx.x];
    add_to(gfim.C[i * gfim.row_stride + j * gfim.col_stride], gfim.alpha, total);
    if (i < j) add_to(gfim.C[j * gfim.row_stride + i * gfim.col_stride], gfim.alpha, total);
  }
}

// gfim.partial has room for gfim_plan(...).partials() numbers.
template <class Mode, class Launch>
void gfim_accumulate(const Factors<typename Mode::Element>& f, Gfim gfim, const Launch& launch) {
  const GfimPlan plan = gfim_plan(f.batch, f.rows, f.cols);
  gfim.splits = plan.splits;
  with_gfim(f.cols, [&](auto form) {
    using Form = decltype(form);
    launch(gfim_kernel<Mode, Form>, grid_of(plan.splits * plan.tiles), Form::Square::kThreads, f,
           f.wide_delta(), f.wide_act(), gfim);
    if (plan.splits > 1)
      launch(gfim_sum_kernel<Form>, grid_of(plan.tiles * plan.side), Form::Square::kN, f.cols,
             gfim);
  });
}

}  // namespace hyperinf::gpu
