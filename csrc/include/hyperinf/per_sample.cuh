// Per-sample gradients of a linear layer, g_b = delta_b^T act_b, on the device: written, or formed
// tile by tile in registers and reduced at once to ||g_b||^2 or <g_b, V_j>.
#pragma once

#include "hyperinf/product.cuh"

namespace hyperinf::gpu {

// delta (batch, tokens, rows) and act (batch, tokens, cols), read through their strides.
template <class T>
struct Factors {
  const T* delta;
  int64_t delta_batch, delta_token, delta_row;
  const T* act;
  int64_t act_batch, act_token, act_col;
  int64_t batch, tokens, rows, cols;

  __device__ Operand<T> delta_of(int64_t b, bool wide) const {
    return {delta + b * delta_batch, delta_token, delta_row, tokens, rows, wide};
  }
  __device__ Operand<T> act_of(int64_t b, bool wide) const {
    return {act + b * act_batch, act_token, act_col, tokens, cols, wide};
  }
  bool wide_delta() const { return is_wide(delta, delta_token, delta_row, delta_batch); }
  bool wide_act() const { return is_wide(act, act_token, act_col, act_batch); }
};

// LoRA ranks get flat tiles, so that little of a tile is padding.
using FlatTile = Tile<16, 128, 4, 4, 1>;
using TallTile = Tile<128, 16, 4, 4, 4>;
using MiddleTile = Tile<64, 64, 8, 4, 2>;
using LargeTile = Tile<128, 128, 8, 4, 4>;

template <class F>
void with_tile(int64_t rows, int64_t cols, const F& f) {
  if (rows <= FlatTile::kM) return f(FlatTile{});
  if (cols <= TallTile::kN) return f(TallTile{});
  if (rows >= LargeTile::kM && cols >= LargeTile::kN) return f(LargeTile{});
  f(MiddleTile{});
}

// Tiles of one sample's gradient: how many partial sums each of its reductions leaves.
inline int64_t tiles_of(int64_t rows, int64_t cols) {
  int64_t tiles = 0;
  with_tile(rows, cols, [&](auto tile) { tiles = parts(rows, tile.kM) * parts(cols, tile.kN); });
  return tiles;
}

// Where a tile lies in its sample's gradient.
struct Place {
  int64_t sample, tile, tiles, row, col, rows, cols;
  int height, width;  // of what is inside the gradient, from the tile's first entry on

  __device__ bool holds(int m, int n) const { return m < height && n < width; }
};

struct WriteGradient {
  float* out;  // (batch, rows, cols)

  template <int THREADS, class P>
  __device__ void operator()(const P& g, typename P::Stage& stage, float*, const Place& at) const {
    float* to = out + (at.sample * at.rows + at.row) * at.cols + at.col;
    g.visit(stage, [&](int m, int n, float value) {
      if (at.holds(m, n)) to[m * at.cols + n] = value;
    });
  }
};

struct SumSquares {
  float* partial;  // (batch, tiles)

  template <int THREADS, class P>
  __device__ void operator()(const P& g, typename P::Stage& stage, float* warps,
                             const Place& at) const {
    float sum = 0;
    g.visit(stage, [&](int m, int n, float value) {
      if (at.holds(m, n)) sum += value * value;
    });
    sum = block_sum<THREADS>(sum, warps);
    if (threadIdx.x == 0) partial[at.sample * at.tiles + at.tile] = sum;
  }
};

struct Dots {
  const float* V;  // (count, rows, cols), contiguous
  int64_t count;
  float* partial;  // (batch, count, tiles)

  template <int THREADS, class P>
  __device__ void operator()(const P& g, typename P::Stage& stage, float* warps,
                             const Place& at) const {
    constexpr int together = 4;
    const float* from = V + at.row * at.cols + at.col;
    const int64_t apart = at.rows * at.cols;
    for (int64_t first = 0; first < count; first += together, from += together * apart) {
      float sums[together] = {};
      g.visit(stage, [&](int m, int n, float value) {
        if (!at.holds(m, n)) return;
        const float* entry = from + m * at.cols + n;
#pragma unroll
        for (int j = 0; j < together; ++j)
          if (first + j < count) sums[j] += value * entry[j * apart];
      });
#pragma unroll
      for (int j = 0; j < together; ++j) {
        const float sum = block_sum<THREADS>(sums[j], warps);
        if (threadIdx.x == 0 && first + j < count)
          partial[(at.sample * count + first + j) * at.tiles + at.tile] = sum;
      }
    }
  }
};

template <class T>
constexpr int kSlabDepth = 64 / sizeof(T);

template <class Mode, class Shape, class Finish>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    per_sample_kernel(Factors<typename Mode::Element> f, bool wide_delta, bool wide_act,
                      Finish finish) {
  using T = typename Mode::Element;
  constexpr int depth = kSlabDepth<T>;
  using P = Product<Mode, Shape, depth>;
  struct Shared {
    union {  // the stage is in use when the slabs are not
      Slabs<T, Shape, depth, false> slabs;
      typename P::Stage stage;
    };
    float warps[Shape::kWarps];
  };
  HYPERINF_SHARED(Shared, shared);
  const int64_t across = parts(f.cols, Shape::kN), tiles = parts(f.rows, Shape::kM) * across;
  for (int64_t item = blockIdx.x; item < f.batch * tiles; item += gridDim.x) {
    const int64_t sample = item / tiles, tile = item % tiles;
    const int64_t row = tile / across * Shape::kM, col = tile % across * Shape::kN;
    const int64_t below = f.rows - row, beside = f.cols - col;
    const Place at{sample,
                   tile,
                   tiles,
                   row,
                   col,
                   f.rows,
                   f.cols,
                   static_cast<int>(below < Shape::kM ? below : Shape::kM),
                   static_cast<int>(beside < Shape::kN ? beside : Shape::kN)};
    P g;
    multiply<Mode, Shape, depth, false>(g, shared.slabs, f.delta_of(sample, wide_delta), at.row,
                                        f.act_of(sample, wide_act), at.col);
    finish.template operator()<Shape::kThreads>(g, shared.stage, shared.warps, at);
    __syncthreads();
  }
}

// ||g||^2 = sum over token pairs of (delta_s . delta_t)(act_s . act_t), which never forms g: one
// partial sum per tile of pairs on or above the diagonal.
using PairTile = Tile<64, 64, 8, 4, 2>;

template <class Mode>
__global__ void __launch_bounds__(PairTile::kThreads, 1)
    ghost_norm_kernel(Factors<typename Mode::Element> f, bool wide_delta, bool wide_act,
                      float* partial) {
  using T = typename Mode::Element;
  constexpr int depth = 2 * kSlabDepth<T>, side = PairTile::kM;
  using P = Product<Mode, PairTile, depth, true>;
  struct Shared {
    Slabs<T, PairTile, depth, true> slabs;
    typename P::Stage stage;
    float warps[PairTile::kWarps];
  };
  HYPERINF_SHARED(Shared, shared);
  const int64_t across = parts(f.tokens, side), tiles = across * (across + 1) / 2;
  for (int64_t item = blockIdx.x; item < f.batch * tiles; item += gridDim.x) {
    const int64_t sample = item / tiles;
    int64_t row = 0, col = item % tiles;
    for (int64_t width = across; col >= width; --width) col -= width, ++row;
    col = (col + row) * side, row *= side;
    const auto delta = f.delta_of(sample, wide_delta), act = f.act_of(sample, wide_act);
    P pairs, acts;
    multiply<Mode, PairTile, depth, true>(pairs, shared.slabs, delta, row, delta, col);
    multiply<Mode, PairTile, depth, true>(acts, shared.slabs, act, row, act, col);
    pairs.multiply_entries(acts);
    float sum = 0;
    pairs.visit(shared.stage, [&](int m, int n, float value) {
      if (row + m < f.tokens && col + n < f.tokens) sum += value;
    });
    sum = block_sum<PairTile::kThreads>(sum, shared.warps);
    if (threadIdx.x == 0) partial[item] = row == col ? sum : 2 * sum;
  }
}

// --- launchers: launch(kernel, blocks, threads, arguments...) starts one kernel on the stream ---

template <class Mode, class Finish, class Launch>
void launch_per_sample(const Factors<typename Mode::Element>& f, const Finish& finish,
                       const Launch& launch) {
  with_tile(f.rows, f.cols, [&](auto tile) {
    using Shape = decltype(tile);
    launch(per_sample_kernel<Mode, Shape, Finish>, grid_of(f.batch * tiles_of(f.rows, f.cols)),
           Shape::kThreads, f, f.wide_delta(), f.wide_act(), finish);
  });
}

// out (batch, rows, cols)
template <class Mode, class Launch>
void per_sample_grad(const Factors<typename Mode::Element>& f, float* out, const Launch& launch) {
  launch_per_sample<Mode>(f, WriteGradient{out}, launch);
}

// Partial sums per sample that per_sample_norm_sq needs room for.
inline int64_t norm_partials(int64_t tokens, int64_t rows, int64_t cols, bool ghost) {
  const int64_t across = parts(tokens, PairTile::kM);
  return ghost ? across * (across + 1) / 2 : tiles_of(rows, cols);
}

// out (batch), partial (batch, norm_partials)
template <class Mode, class Launch>
void per_sample_norm_sq(const Factors<typename Mode::Element>& f, bool ghost, float* partial,
                        float* out, const Launch& launch) {
  const int64_t count = norm_partials(f.tokens, f.rows, f.cols, ghost);
  if (ghost)
    launch(ghost_norm_kernel<Mode>, grid_of(f.batch * count), PairTile::kThreads, f, f.wide_delta(),
           f.wide_act(), partial);
  else
    launch_per_sample<Mode>(f, SumSquares{partial}, launch);
  sum_partials(partial, out, f.batch, count, true, launch);
}

// out (batch, count), dots.partial (batch, count, tiles_of(rows, cols))
template <class Mode, class Launch>
void per_sample_dot(const Factors<typename Mode::Element>& f, const Dots& dots, float* out,
                    const Launch& launch) {
  launch_per_sample<Mode>(f, dots, launch);
  sum_partials(dots.partial, out, f.batch * dots.count, tiles_of(f.rows, f.cols), false, launch);
}

}  // namespace hyperinf::gpu
