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

// The output in tiles, the depth in parts, each an item of its own, and a part in runs, each one
// product: all from the shape, so threads do not change a bit.
struct Plan {
  int64_t side;  // of a tile
  int64_t batch, rows, cols, depth, row_tiles, col_tiles, parts, part, run;
  bool symmetric;

  int64_t tiles() const {
    return symmetric ? row_tiles * (row_tiles + 1) / 2 : row_tiles * col_tiles;
  }
};

struct Place {
  int64_t batch, row, col;  // of the tile's first element
};

Plan make_plan(int64_t side, int64_t batch, int64_t rows, int64_t cols, int64_t depth,
               bool symmetric, bool runs) {
  constexpr int64_t shortest = 1024;
  const int64_t enough_items = runs ? 24 : 48;     // their sums are as large as tiles of doubles
  const int64_t longest = runs ? kGramRun : 4096;  // sums of few blocks keep their rounding small
  const auto pieces = [](int64_t size, int64_t of) { return (size + of - 1) / of; };
  Plan plan{side, batch, rows,  cols,     depth, pieces(rows, side), pieces(cols, side),
            1,    depth, depth, symmetric};
  const int64_t wanted = enough_items / std::max<int64_t>(1, batch * plan.tiles());
  if (wanted > 1 && depth >= 2 * shortest)
    plan.part = pieces(depth, std::min(wanted, depth / shortest));
  plan.parts = pieces(depth, plan.part);
  plan.run = pieces(plan.part, pieces(plan.part, longest));
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

// total (+)= next, only where the product was written
template <bool Add, class Sum, class Acc>
void add_part(const Plan& plan, const Place& at, Sum* total, const Acc* next) {
  const int64_t rows = std::min(plan.side, plan.rows - at.row);
  const int64_t cols = std::min(plan.side, plan.cols - at.col);
  const bool diagonal = plan.symmetric && at.row == at.col;
  for (int64_t i = 0; i < rows; ++i) {
    Sum* const to = total + i * plan.side;
    const Acc* const from = next + i * plan.side;
    for (int64_t j = diagonal ? i : 0; j < cols; ++j)
      to[j] = Add ? to[j] + static_cast<Sum>(from[j]) : static_cast<Sum>(from[j]);
  }
}

GramArgs gram_args(RowType type, const Tensor& X, const Tensor& Y, const Plan& plan,
                   const Place& at, int64_t start, int64_t depth, void* tile, void* panels) {
  const auto operand = [&](const Tensor& t, int64_t row) {
    const int64_t offset = at.batch * t.stride(0) + row * t.stride(1) + start * t.stride(2);
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
          depth,
          plan.symmetric && at.row == at.col,
          tile,
          panels};
}

// Products in Acc, their sums and C in Sum.
template <class Acc, class Sum>
void accumulate(const Tensor& C, const Tensor& X, const Tensor& Y, RowType type, const Plan& plan,
                double alpha) {
  constexpr bool apart = !std::is_same_v<Acc, Sum>;  // a product is never a sum itself
  const auto product = std::is_same_v<Acc, double> ? kernels().gram_tile64 : kernels().gram_tile;
  const int64_t tiles = plan.batch * plan.tiles();
  // no row below the last one is written, and a sum of few rows has many partial tiles
  const int64_t groups = (plan.rows + kGramRowGroup - 1) / kGramRowGroup;
  const int64_t tall = std::min(plan.side, groups * kGramRowGroup);
  const int64_t area = tall * plan.side, items = tiles * plan.parts;
  const int64_t workers = worker_count(items);
  const auto panels = aligned<Acc>(workers * kGramPanels<Acc>);
  const auto next = aligned<Acc>(workers * area);
  const auto sums = aligned<Sum>((plan.parts > 1 ? items : workers) * area);
  const auto sum_item = [&](int64_t item, int64_t worker, Sum* total) {
    const Place at = place_of(plan, item % tiles);
    const int64_t start = item / tiles * plan.part;
    const int64_t end = std::min(plan.depth, start + plan.part);
    Acc* const own = panels.get() + worker * kGramPanels<Acc>;
    for (int64_t k = start; k < end; k += plan.run) {
      const int64_t depth = std::min(plan.run, end - k);
      void* const tile =
          apart || k > start ? static_cast<void*>(next.get() + worker * area) : total;
      product(gram_args(type, X, Y, plan, at, k, depth, tile, own));
      if (k > start)
        add_part<true>(plan, at, total, static_cast<const Acc*>(tile));
      else if (apart)
        add_part<false>(plan, at, total, static_cast<const Acc*>(tile));
    }
  };
  if (plan.parts == 1) {
    for_each_item(tiles, [&](int64_t t, int64_t worker) {
      Sum* const total = sums.get() + worker * area;
      sum_item(t, worker, total);
      add_tile(C, plan, place_of(plan, t), total, alpha);
    });
    return;
  }
  for_each_item(items, [&](int64_t item, int64_t worker) {
    sum_item(item, worker, sums.get() + item * area);
  });
  for_each_item(tiles, [&](int64_t t, int64_t) {
    Sum* const total = sums.get() + t * area;
    for (int64_t part = 1; part < plan.parts; ++part)
      add_part<true>(plan, place_of(plan, t), total, total + part * tiles * area);
    add_tile(C, plan, place_of(plan, t), total, alpha);
  });
}

}  // namespace

void gram_accumulate_(const Tensor& C, const Tensor& X, const std::optional<Tensor>& other,
                      double alpha, bool runs) {
  const Tensor& Y = other.has_value() ? *other : X;
  check_dims("C", C, 3);
  check_dims("X", X, 3);
  check_dims("Y", Y, 3);
  const bool wide = is_double(C);
  STD_TORCH_CHECK(wide || C.scalar_type() == torch::headeronly::ScalarType::Float,
                  "C must be fp32 or fp64");
  STD_TORCH_CHECK(X.scalar_type() == Y.scalar_type(), "X and Y must have one dtype");
  STD_TORCH_CHECK(wide || !runs, "runs are added in fp64, so C must be fp64");
  const RowType type = wide && !runs && is_double(X) ? RowType::kDouble : row_type("X", X);
  const int64_t batch = C.size(0), rows = C.size(1), cols = C.size(2), depth = X.size(2);
  STD_TORCH_CHECK(X.size(0) == batch && X.size(1) == rows && Y.size(0) == batch &&
                      Y.size(1) == cols && Y.size(2) == depth,
                  "gram_accumulate_: C (b, n1, n2), X (b, n1, D) and Y (b, n2, D) must agree");
  if (batch == 0 || rows == 0 || cols == 0 || depth == 0) return;
  check_own_memory("C", C);
  check_apart("C", C, "X", X);
  check_apart("C", C, "Y", Y);

  const int64_t side = wide && !runs ? kGramTile<double> : kGramTile<float>;
  const Plan plan = make_plan(side, batch, rows, cols, depth, !other.has_value(), runs);
  if (runs)
    accumulate<float, double>(C, X, Y, type, plan, alpha);
  else if (wide)
    accumulate<double, double>(C, X, Y, type, plan, alpha);
  else
    accumulate<float, float>(C, X, Y, type, plan, alpha);
}

}  // namespace hyperinf

STABLE_TORCH_LIBRARY_IMPL(hyperinf, CPU, m) {
  m.impl("gram_accumulate_", TORCH_BOX(&hyperinf::gram_accumulate_));
}
