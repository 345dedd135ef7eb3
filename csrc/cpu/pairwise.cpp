// hyperinf::pairwise_dot on CPU: all pairs of two sets of per-sample gradients, either from token
// by token products in tiles, or from gradients that exist for one block of features at a time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

#include "cpu/gradient.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace hyperinf {

using torch::stable::Tensor;

namespace {

constexpr int64_t kSide = kGramTile<float>;
constexpr int64_t kBlockFloats = 1 << 20;  // of gradients that exist at once, both sets together

// How many samples' tokens share a tile: several only where they are evenly spaced rows.
int64_t samples_per_tile(const Gradients& g) {
  const bool even = g.delta.sample_stride == g.tokens * g.delta.stride &&
                    g.act.sample_stride == g.tokens * g.act.stride;
  return even ? std::clamp<int64_t>(kSide / g.tokens, 1, g.batch) : 1;
}

// out[p][q] = sum of (delta_p delta_q^T) * (act_p act_q^T)
void from_tokens(const Gradients& a, const Gradients& b, float* out) {
  const int64_t each_a = samples_per_tile(a), each_b = samples_per_tile(b);
  const int64_t across = parts(b.batch, each_b), items = parts(a.batch, each_a) * across;
  const int64_t workers = worker_count(items), area = kSide * kSide;
  const auto tiles = aligned_floats(workers * 2 * area);
  const auto panels = aligned_floats(workers * kGramPanels<float>);
  const auto sums = aligned<double>(workers * each_a * each_b);
  for_each_item(items, [&](int64_t item, int64_t worker) {
    const int64_t p0 = item / across * each_a, ps = std::min(each_a, a.batch - p0);
    const int64_t q0 = item % across * each_b, qs = std::min(each_b, b.batch - q0);
    float *const x = tiles.get() + worker * 2 * area, *const y = x + area;
    double* const total = sums.get() + worker * each_a * each_b;
    std::fill(total, total + ps * qs, 0.0);
    // a sample of more tokens than a tile is alone in it and takes several
    for (int64_t i = 0; i < ps * a.tokens; i += kSide)
      for (int64_t j = 0; j < qs * b.tokens; j += kSide) {
        const int64_t rows = std::min(kSide, ps * a.tokens - i);
        const int64_t cols = std::min(kSide, qs * b.tokens - j);
        const auto product = [&](const Factor& f, const Factor& g, int64_t features, float* tile) {
          a.table.gram_tile({a.type, f.at(p0, i, 0), f.stride, 1, g.at(q0, j, 0), g.stride, 1, rows,
                             cols, features, false, tile,
                             panels.get() + worker * kGramPanels<float>});
        };
        product(a.delta, b.delta, a.rows, x);
        product(a.act, b.act, a.cols, y);
        const int64_t high = rows / ps, wide = cols / qs;
        for (int64_t p = 0; p < ps; ++p)
          for (int64_t q = 0; q < qs; ++q) {
            const int64_t at = p * high * kSide + q * wide;
            total[p * qs + q] += a.table.block_dot(x + at, kSide, y + at, kSide, high, wide);
          }
      }
    for (int64_t p = 0; p < ps; ++p)
      for (int64_t q = 0; q < qs; ++q)
        out[(p0 + p) * b.batch + q0 + q] = static_cast<float>(total[p * qs + q]);
  });
}

// One block of features of every gradient, flattened: (b, 1, rows * cols).
Tensor block_of(const Gradients& g, const Gradients::Tile& at, const Tensor& like) {
  Tensor out = new_output("act", like, {1, g.batch, at.rows * at.cols});
  float* const to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t workers = worker_count(g.batch);
  const auto scratch = aligned_floats(workers * g.scratch());
  const auto panels = aligned_floats(workers * g.panels());
  for_each_item(g.batch, [&](int64_t sample, int64_t worker) {
    float* const tile = scratch.get() + worker * g.scratch();
    g.form(sample, at, tile, panels.get() + worker * g.panels());
    const int64_t rows = g.turned ? at.cols : at.rows, cols = g.turned ? at.rows : at.cols;
    for (int64_t i = 0; i < rows; ++i)
      std::memcpy(to + (sample * rows + i) * cols, tile + i * g.stride(),
                  static_cast<size_t>(cols) * sizeof(float));
  });
  return out;
}

// out[p][q] += x_p . y_q, a piece at a time so that long sums keep their precision
void add_pairs(const Gradients& g, const Tensor& x, const Tensor& y, const Tensor& out) {
  constexpr int64_t piece = 1024;
  const int64_t size = x.size(2), across = y.size(1), whole = size / piece;
  const auto* left = static_cast<const float*>(x.const_data_ptr());
  const auto* right = static_cast<const float*>(y.const_data_ptr());
  auto* sums = static_cast<float*>(out.mutable_data_ptr());
  for_each_item(x.size(1) * across, [&](int64_t i, int64_t) {
    const float *p = left + i / across * size, *q = right + i % across * size;
    const int64_t done = whole * piece;
    sums[i] += static_cast<float>(g.table.block_dot(p, piece, q, piece, whole, piece) +
                                  g.table.block_dot(p + done, 0, q + done, 0, 1, size - done));
  });
}

void from_blocks(Gradients& a, Gradients& b, bool same, const Tensor& like, const Tensor& out) {
  // both sets in equal tiles, small enough for all samples of both
  const int64_t wanted = kBlockFloats / (a.batch + b.batch);
  for (Gradients* g : {&a, &b}) {
    int64_t& longest = g->turned ? g->tile_rows : g->tile_cols;
    const int64_t across =
        std::min(g->turned ? g->tile_cols : g->tile_rows, g->turned ? g->cols : g->rows);
    longest = std::clamp<int64_t>(wanted / across, 32, longest);
  }
  // few pairs leave most of a product's register tile empty
  const bool few = a.batch * b.batch <= 256;
  for (int64_t t = 0; t < a.tiles(); ++t) {
    const Tensor x = block_of(a, a.tile(t), like);
    const Tensor y = same ? x : block_of(b, b.tile(t), like);
    if (few)
      add_pairs(a, x, y, out);
    else
      gram_accumulate_(out, x, same ? std::nullopt : std::optional(y), 1);
  }
}

bool same_memory(const Factor& f, const Factor& g) {
  return f.data == g.data && f.sample_stride == g.sample_stride && f.stride == g.stride;
}

Tensor pairwise_dot(const Tensor& delta1, const Tensor& act1, const Tensor& delta2,
                    const Tensor& act2, bool ghost) {
  Gradients a("delta1", delta1, "act1", act1), b("delta2", delta2, "act2", act2);
  STD_TORCH_CHECK(a.rows == b.rows, "delta1 and delta2 must have one number of features");
  STD_TORCH_CHECK(a.cols == b.cols, "act1 and act2 must have one number of features");
  STD_TORCH_CHECK(a.type == b.type, "delta1 and delta2 must have one dtype");
  Tensor out = new_output("delta1 and delta2", act1, {1, a.batch, b.batch});
  float* const result = static_cast<float*>(out.mutable_data_ptr());
  std::fill(result, result + a.batch * b.batch, 0.0f);
  const bool empty =
      a.batch == 0 || b.batch == 0 || a.tokens == 0 || b.tokens == 0 || a.rows == 0 || a.cols == 0;
  const bool same = a.batch == b.batch && a.tokens == b.tokens && same_memory(a.delta, b.delta) &&
                    same_memory(a.act, b.act);
  if (!empty && ghost)
    from_tokens(a, b, result);
  else if (!empty)
    from_blocks(a, b, same, act1, out);
  const int64_t square[] = {a.batch, b.batch};
  return torch::stable::view(out, square);
}

}  // namespace

}  // namespace hyperinf

STABLE_TORCH_LIBRARY_IMPL(hyperinf, CPU, m) {
  m.impl("pairwise_dot", TORCH_BOX(&hyperinf::pairwise_dot));
}
