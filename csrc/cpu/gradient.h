// Per-sample gradients delta^T act in tiles that stay in cache, whichever kernel forms them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "cpu/checks.h"
#include "cpu/kernels.h"

namespace hyperinf {

inline int64_t parts(int64_t size, int64_t of) { return (size + of - 1) / of; }

// One factor (b, T, features) with unit column stride.
struct Factor {
  const char* data;
  int64_t sample_stride, stride, width;  // strides in elements; bytes of an element

  Factor(const char* name, const torch::stable::Tensor& t)
      : data(static_cast<const char*>(t.const_data_ptr())),
        sample_stride(t.dim() == 3 ? t.stride(0) : 0),
        stride(t.dim() == 3 ? t.stride(1) : 0),
        width(static_cast<int64_t>(t.element_size())) {
    check_dims(name, t, 3);
    row_type(name, t);
    STD_TORCH_CHECK(t.size(2) <= 1 || t.stride(2) == 1, name, " must have unit column stride");
  }
  const char* at(int64_t sample, int64_t token, int64_t column) const {
    return data + (sample * sample_stride + token * stride + column) * width;
  }
};

// The gradients g_b = delta_b^T act_b (O, I) of delta (b, T, O) and act (b, T, I).
struct Gradients {
  Factor delta, act;
  RowType type;
  int64_t batch, tokens, rows, cols;
  bool thin, turned;             // one side at most kMostThin; a tile then holds g, or g^T
  int64_t tile_rows, tile_cols;  // of g
  const Kernels& table = kernels();

  Gradients(const char* delta_name, const torch::stable::Tensor& d, const char* act_name,
            const torch::stable::Tensor& a)
      : delta(delta_name, d), act(act_name, a), type(row_type(act_name, a)) {
    STD_TORCH_CHECK(d.scalar_type() == a.scalar_type(), delta_name, " and ", act_name,
                    " must have one dtype");
    STD_TORCH_CHECK(d.size(0) == a.size(0) && d.size(1) == a.size(1), delta_name, " (b, T, O) and ",
                    act_name, " (b, T, I) must agree in b and T");
    batch = a.size(0), tokens = a.size(1), rows = d.size(2), cols = a.size(2);
    thin = std::min(rows, cols) <= kMostThin;
    turned = thin && cols < rows;
    tile_rows = !thin ? kGramTile<float> : turned ? kThinColumns : kMostThin;
    tile_cols = !thin ? kGramTile<float> : turned ? kMostThin : kThinColumns;
  }

  int64_t tiles() const { return parts(rows, tile_rows) * parts(cols, tile_cols); }
  // scratch of a tile, which the kernels lay out for the largest one
  int64_t stride() const { return thin ? kThinColumns : kGramTile<float>; }
  int64_t scratch() const { return stride() * (thin ? kMostThin : kGramTile<float>); }
  int64_t panels() const { return thin ? 1 : kGramPanels<float>; }

  struct Tile {
    int64_t row, col, rows, cols;
  };
  Tile tile(int64_t index) const {
    const int64_t across = parts(cols, tile_cols);
    const int64_t row = index / across * tile_rows, col = index % across * tile_cols;
    return {row, col, std::min(tile_rows, rows - row), std::min(tile_cols, cols - col)};
  }

  void form(int64_t sample, const Tile& at, float* out, float* panels) const {
    const char* const d = delta.at(sample, 0, at.row);
    const char* const a = act.at(sample, 0, at.col);
    if (turned)
      table.thin_product({type, a, act.stride, at.cols, d, delta.stride, at.rows, tokens, out});
    else if (thin)
      table.thin_product({type, d, delta.stride, at.rows, a, act.stride, at.cols, tokens, out});
    else
      table.gram_tile({type, d, 1, delta.stride, a, 1, act.stride, at.rows, at.cols, tokens, false,
                       out, panels});
  }
};

}  // namespace hyperinf
