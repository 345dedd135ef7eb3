// hyperinf::per_sample_grad, _norm_sq and _dot on CPU. A gradient that is only reduced exists one
// tile at a time, in the cache of the thread that reduces it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

#include "cpu/gradient.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace hyperinf {

using torch::stable::Tensor;

namespace {

void clear(float* out, int64_t count) { std::fill(out, out + count, 0.0f); }

Tensor per_sample_grad(const Tensor& delta, const Tensor& act) {
  const Gradients g("delta", delta, "act", act);
  Tensor out = new_output("delta and act", act, {g.batch, g.rows, g.cols});
  if (g.batch == 0 || g.rows == 0 || g.cols == 0) return out;
  float* const result = static_cast<float*>(out.mutable_data_ptr());
  if (g.tokens == 0) return clear(result, g.batch * g.rows * g.cols), out;

  const int64_t tiles = g.tiles(), items = g.batch * tiles, workers = worker_count(items);
  const auto scratch = aligned_floats(workers * g.scratch());
  const auto panels = aligned_floats(workers * g.panels());
  for_each_item(items, [&](int64_t item, int64_t worker) {
    const auto at = g.tile(item % tiles);
    float* const tile = scratch.get() + worker * g.scratch();
    g.form(item / tiles, at, tile, panels.get() + worker * g.panels());
    float* to = result + (item / tiles * g.rows + at.row) * g.cols + at.col;
    for (int64_t i = 0; i < at.rows; ++i, to += g.cols)
      if (g.turned)
        for (int64_t j = 0; j < at.cols; ++j) to[j] = tile[j * g.stride() + i];
      else
        std::memcpy(to, tile + i * g.stride(), static_cast<size_t>(at.cols) * sizeof(float));
  });
  return out;
}

// sum of (delta delta^T) * (act act^T) of one sample, in tiles on and above the diagonal
double ghost_norm(const Gradients& g, int64_t sample, float* tiles, float* panels) {
  constexpr int64_t side = kGramTile<float>;
  double total = 0;
  const auto product = [&](const Factor& f, int64_t features, int64_t i, int64_t j, float* out) {
    g.table.gram_tile({g.type, f.at(sample, i, 0), f.stride, 1, f.at(sample, j, 0), f.stride, 1,
                       std::min(side, g.tokens - i), std::min(side, g.tokens - j), features, i == j,
                       out, panels});
  };
  for (int64_t i = 0; i < g.tokens; i += side)
    for (int64_t j = i; j < g.tokens; j += side) {
      float *const x = tiles, *const y = tiles + side * side;
      product(g.delta, g.rows, i, j, x);
      product(g.act, g.cols, i, j, y);
      const int64_t rows = std::min(side, g.tokens - i), cols = std::min(side, g.tokens - j);
      if (i != j) {
        total += 2 * g.table.block_dot(x, side, y, side, rows, cols);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = r * side + r;
        total += static_cast<double>(x[at]) * y[at] +
                 2 * g.table.block_dot(x + at + 1, side, y + at + 1, side, 1, rows - r - 1);
      }
    }
  return total;
}

Tensor per_sample_norm_sq(const Tensor& delta, const Tensor& act, bool ghost) {
  const Gradients g("delta", delta, "act", act);
  Tensor out = new_output("act", act, {g.batch});
  float* const result = static_cast<float*>(out.mutable_data_ptr());
  clear(result, g.batch);
  if (g.batch == 0 || g.rows == 0 || g.cols == 0 || g.tokens == 0) return out;

  const int64_t workers = worker_count(g.batch);
  const int64_t area = ghost ? 2 * kGramTile<float> * kGramTile<float> : g.scratch();
  const int64_t panel_size = ghost ? kGramPanels<float> : g.panels();
  const auto scratch = aligned_floats(workers * area);
  const auto panels = aligned_floats(workers * panel_size);
  for_each_item(g.batch, [&](int64_t sample, int64_t worker) {
    float* const tile = scratch.get() + worker * area;
    float* const spare = panels.get() + worker * panel_size;
    double total = 0;
    if (ghost) total = ghost_norm(g, sample, tile, spare);
    for (int64_t t = 0; !ghost && t < g.tiles(); ++t) {
      const auto at = g.tile(t);
      g.form(sample, at, tile, spare);
      const int64_t rows = g.turned ? at.cols : at.rows, cols = g.turned ? at.rows : at.cols;
      total += g.table.block_dot(tile, g.stride(), tile, g.stride(), rows, cols);
    }
    // cancellation can leave a sum of squares slightly below zero
    result[sample] = static_cast<float>(total < 0 ? 0 : total);
  });
  return out;
}

// V (m, O, I) in the layout of the tiles: (m, I, O) where they hold g^T.
std::unique_ptr<float[], FreeAligned> turned_copy(const float* V, int64_t count, int64_t rows,
                                                  int64_t cols) {
  auto copy = aligned_floats(count * rows * cols);
  for (int64_t m = 0; m < count; ++m)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j)
        copy[(m * cols + j) * rows + i] = V[(m * rows + i) * cols + j];
  return copy;
}

Tensor per_sample_dot(const Tensor& delta, const Tensor& act, const Tensor& V) {
  const Gradients g("delta", delta, "act", act);
  check_dims("V", V, 3);
  check_contiguous_float("V", V);
  STD_TORCH_CHECK(V.size(1) == g.rows && V.size(2) == g.cols, "V must be (m, O, I)");
  const int64_t count = V.size(0);
  Tensor out = new_output("delta and V", act, {g.batch, count});
  checked_product("delta and V", {std::max<int64_t>(1, g.batch * count), g.tiles(), 8});
  float* const result = static_cast<float*>(out.mutable_data_ptr());
  if (g.batch == 0 || count == 0) return out;
  clear(result, g.batch * count);
  if (g.rows == 0 || g.cols == 0 || g.tokens == 0) return out;

  const auto* v = static_cast<const float*>(V.const_data_ptr());
  const auto turned = g.turned ? turned_copy(v, count, g.rows, g.cols) : aligned_floats(1);
  if (g.turned) v = turned.get();
  const int64_t tiles = g.tiles(), items = tiles * g.batch, workers = worker_count(items);
  const auto scratch = aligned_floats(workers * g.scratch());
  const auto panels = aligned_floats(workers * g.panels());
  const auto partial = aligned<double>(items * count);
  // samples follow each other on one tile of V, which stays in cache
  for_each_item(items, [&](int64_t item, int64_t worker) {
    const auto at = g.tile(item / g.batch);
    float* const tile = scratch.get() + worker * g.scratch();
    g.form(item % g.batch, at, tile, panels.get() + worker * g.panels());
    const int64_t row = g.turned ? at.col : at.row, col = g.turned ? at.row : at.col;
    const int64_t rows = g.turned ? at.cols : at.rows, cols = g.turned ? at.rows : at.cols;
    const int64_t width = g.turned ? g.rows : g.cols;
    for (int64_t m = 0; m < count; ++m)
      partial[item * count + m] = g.table.block_dot(
          tile, g.stride(), v + m * g.rows * g.cols + row * width + col, width, rows, cols);
  });
  for (int64_t i = 0; i < g.batch * count; ++i) {
    double total = 0;
    for (int64_t t = 0; t < tiles; ++t) total += partial[t * g.batch * count + i];
    result[i] = static_cast<float>(total);
  }
  return out;
}

}  // namespace

}  // namespace hyperinf

STABLE_TORCH_LIBRARY_IMPL(hyperinf, CPU, m) {
  m.impl("per_sample_grad", TORCH_BOX(&hyperinf::per_sample_grad));
  m.impl("per_sample_norm_sq", TORCH_BOX(&hyperinf::per_sample_norm_sq));
  m.impl("per_sample_dot", TORCH_BOX(&hyperinf::per_sample_dot));
}
