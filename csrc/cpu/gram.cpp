// hyperinf::gram_accumulate_ on CPU: C += alpha X Y^T, or alpha X X^T at half the work.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace hyperinf {

using torch::stable::Tensor;

namespace {

// The output in tiles, the depth in chunks: all from the shape, so threads do not change a bit.
struct Plan {
  int64_t side;  // of a tile
  int64_t batch, rows, cols, depth, row_tiles, col_tiles, chunks, chunk;
  bool symmetric, chunks_apart;  // chunks are items of their own, or follow each other in one

  int64_t tiles() const {
    return symmetric ? row_tiles * (row_tiles + 1) / 2 : row_tiles * col_tiles;
  }
};

struct Place {
  int64_t batch, row, col;  // of the tile's first element
};

Plan make_plan(int64_t side, int64_t batch, int64_t rows, int64_t cols, int64_t depth,
               bool symmetric) {
  constexpr int64_t enough_items = 48, shortest = 1024;
  constexpr int64_t longest = 4096;  // a running sum of few blocks keeps its rounding small
  const auto parts = [](int64_t size, int64_t of) { return (size + of - 1) / of; };
  Plan plan{side, batch, rows,      cols, depth, parts(rows, side), parts(cols, side),
            1,    depth, symmetric, false};
  const int64_t wanted = enough_items / std::max<int64_t>(1, batch * plan.tiles());
  plan.chunks_apart = wanted > 1 && depth >= 2 * shortest;
  const int64_t chunks =
      plan.chunks_apart ? std::min(wanted, depth / shortest) : parts(depth, longest);
  plan.chunk = parts(depth, chunks);
  plan.chunks = parts(depth, plan.chunk);
  return plan;
}

Place place_of(const Plan& plan, int64_t tile) {
  const int64_t batch = tile / plan.tiles();
  int64_t left = tile % plan.tiles(), row = 0;
  for (int64_t width = plan.col_tiles; left >= width; ++row) {
    left -= width;
    if (plan.symmetric) --width;
  }
  return {batch, row * plan.side, (left + (plan.symmetric ? row : 0)) * plan.side};
}

// C += alpha * tile, and its mirror image; small squares keep both sides in cache.
template <class Acc>
void add_tile(const Tensor& C, const Plan& plan, const Place& at, const Acc* tile, double alpha) {
  constexpr int64_t square = 32;
  const int64_t rs = C.stride(1), cs = C.stride(2);
  Acc* c = static_cast<Acc*>(C.mutable_data_ptr()) + at.batch * C.stride(0);
  const int64_t rows = std::min(plan.side, plan.rows - at.row);
  const int64_t cols = std::min(plan.side, plan.cols - at.col);
  const bool diagonal = plan.symmetric && at.row == at.col;
  const auto add = [&](Acc& entry, Acc value) { entry = static_cast<Acc>(entry + alpha * value); };
  for (int64_t i0 = 0; i0 < rows; i0 += square)
    for (int64_t j0 = diagonal ? i0 : 0; j0 < cols; j0 += square) {
      const int64_t i1 = std::min(rows, i0 + square), j1 = std::min(cols, j0 + square);
      for (int64_t i = i0; i < i1; ++i) {
        Acc* const line = c + (at.row + i) * rs + at.col * cs;
        const Acc* const from = tile + i * plan.side;
        const int64_t first = diagonal ? std::max(i, j0) : j0;
        if (cs == 1)
          for (int64_t j = first; j < j1; ++j) add(line[j], from[j]);
        else
          for (int64_t j = first; j < j1; ++j) add(line[j * cs], from[j]);
      }
      if (!plan.symmetric) continue;
      for (int64_t j = j0; j < j1; ++j) {
        Acc* const line = c + (at.col + j) * rs + at.row * cs;
        for (int64_t i = i0; i < (diagonal ? std::min(i1, j) : i1); ++i)
          add(line[i * cs], tile[i * plan.side + j]);
      }
    }
}

// total += next, only where the product was written
template <class Acc>
void add_chunk(const Plan& plan, const Place& at, Acc* total, const Acc* next) {
  const int64_t rows = std::min(plan.side, plan.rows - at.row);
  const int64_t cols = std::min(plan.side, plan.cols - at.col);
  const bool diagonal = plan.symmetric && at.row == at.col;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = diagonal ? i : 0; j < cols; ++j)
      total[i * plan.side + j] += next[i * plan.side + j];
}

GramArgs gram_args(RowType type, const Tensor& X, const Tensor& Y, const Plan& plan,
                   const Place& at, int64_t chunk, void* tile, void* panels) {
  const auto operand = [&](const Tensor& t, int64_t row) {
    const int64_t offset =
        at.batch * t.stride(0) + row * t.stride(1) + chunk * plan.chunk * t.stride(2);
    return static_cast<const char*>(t.const_data_ptr()) +
           offset * static_cast<int64_t>(t.element_size());
  };
  return {type,
          operand(X, at.row),
          X.stride(1),
          X.stride(2),
          operand(Y, at.col),
          Y.stride(1),
          Y.stride(2),
          std::min(plan.side, plan.rows - at.row),
          std::min(plan.side, plan.cols - at.col),
          std::min(plan.chunk, plan.depth - chunk * plan.chunk),
          plan.symmetric && at.row == at.col,
          tile,
          panels};
}

template <class Acc>
void accumulate(const Tensor& C, const Tensor& X, const Tensor& Y, RowType type, const Plan& plan,
                double alpha) {
  const auto product = std::is_same_v<Acc, double> ? kernels().gram_tile64 : kernels().gram_tile;
  const int64_t tiles = plan.batch * plan.tiles();
  // no row below the last one is written, and a sum of few rows has many partial tiles
  const int64_t groups = (plan.rows + kGramRowGroup - 1) / kGramRowGroup;
  const int64_t tall = std::min(plan.side, groups * kGramRowGroup);
  const int64_t area = tall * plan.side;
  const int64_t items = plan.chunks_apart ? tiles * plan.chunks : tiles,
                workers = worker_count(items);
  const auto panels = aligned<Acc>(workers * kGramPanels<Acc>);
  const auto own = [&](int64_t worker) { return panels.get() + worker * kGramPanels<Acc>; };
  if (!plan.chunks_apart) {
    const auto partial = aligned<Acc>(workers * 2 * area);
    for_each_item(tiles, [&](int64_t t, int64_t worker) {
      const Place at = place_of(plan, t);
      Acc* const total = partial.get() + worker * 2 * area;
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        Acc* const tile = chunk == 0 ? total : total + area;
        product(gram_args(type, X, Y, plan, at, chunk, tile, own(worker)));
        if (chunk > 0) add_chunk(plan, at, total, tile);
      }
      add_tile(C, plan, at, total, alpha);
    });
    return;
  }
  const auto partial = aligned<Acc>(items * area);
  for_each_item(items, [&](int64_t item, int64_t worker) {
    product(gram_args(type, X, Y, plan, place_of(plan, item % tiles), item / tiles,
                      partial.get() + item * area, own(worker)));
  });
  for_each_item(tiles, [&](int64_t t, int64_t) {
    Acc* const total = partial.get() + t * area;
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk)
      add_chunk(plan, place_of(plan, t), total, total + chunk * tiles * area);
    add_tile(C, plan, place_of(plan, t), total, alpha);
  });
}

}  // namespace

void gram_accumulate_(const Tensor& C, const Tensor& X, const std::optional<Tensor>& other,
                      double alpha) {
  const Tensor& Y = other.has_value() ? *other : X;
  check_dims("C", C, 3);
  check_dims("X", X, 3);
  check_dims("Y", Y, 3);
  const bool wide = is_double(C);
  STD_TORCH_CHECK(wide || C.scalar_type() == torch::headeronly::ScalarType::Float,
                  "C must be fp32 or fp64");
  STD_TORCH_CHECK(X.scalar_type() == Y.scalar_type(), "X and Y must have one dtype");
  const RowType type = wide && is_double(X) ? RowType::kDouble : row_type("X", X);
  const int64_t batch = C.size(0), rows = C.size(1), cols = C.size(2), depth = X.size(2);
  STD_TORCH_CHECK(X.size(0) == batch && X.size(1) == rows && Y.size(0) == batch &&
                      Y.size(1) == cols && Y.size(2) == depth,
                  "gram_accumulate_: C (b, n1, n2), X (b, n1, D) and Y (b, n2, D) must agree");
  if (batch == 0 || rows == 0 || cols == 0 || depth == 0) return;
  check_own_memory("C", C);
  check_apart("C", C, "X", X);
  check_apart("C", C, "Y", Y);

  const int64_t side = wide ? kGramTile<double> : kGramTile<float>;
  const Plan plan = make_plan(side, batch, rows, cols, depth, !other.has_value());
  if (wide)
    accumulate<double>(C, X, Y, type, plan, alpha);
  else
    accumulate<float>(C, X, Y, type, plan, alpha);
}

}  // namespace hyperinf

STABLE_TORCH_LIBRARY_IMPL(hyperinf, CPU, m) {
  m.impl("gram_accumulate_", TORCH_BOX(&hyperinf::gram_accumulate_));
}
