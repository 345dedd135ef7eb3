// hyperinf::sherman_morrison on CPU: checks, scratch, slabs over threads, ordered reduction.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace hyperinf {

using torch::stable::Tensor;

// Slabs follow from the shape alone, so the result does not depend on the number of threads. A slab
// is long enough that clearing and adding up its totals stays a few percent of reading its rows.
static int64_t slab_rows(int64_t rows, int64_t queries) {
  constexpr int64_t most_slabs = 16, block = 8;
  const int64_t shortest = 64 * queries;
  const int64_t slabs = std::clamp<int64_t>(rows / shortest, rows >= 64 ? 2 : 1, most_slabs);
  const int64_t each = (rows + slabs - 1) / slabs;
  return (each + block - 1) / block * block;
}

// out_q = (v_q - total_q / n) / damping, the slabs' totals added in their order.
static void finish(const float* totals, int64_t slabs, int64_t queries, int64_t columns,
                   const float* V, double rows, float damping, float* out) {
  constexpr int64_t piece = 4096;
  const int64_t size = queries * columns;
  for_each_item((size + piece - 1) / piece, [&](int64_t item, int64_t) {
    const int64_t end = std::min(size, (item + 1) * piece);
    for (int64_t i = item * piece; i < end; ++i) {
      float total = totals[i];
      for (int64_t s = 1; s < slabs; ++s) total += totals[s * size + i];
      out[i] = (V[i] - total / static_cast<float>(rows)) / damping;
    }
  });
}

static Tensor sherman_morrison(const Tensor& V, const Tensor& G, const Tensor& damping) {
  check_dims("V", V, 3);
  check_dims("G", G, 3);
  check_dims("damping", damping, 1);
  check_contiguous_float("V", V);
  check_contiguous_float("damping", damping);
  const RowType type = row_type("G", G);
  const int64_t batch = V.size(0), queries = V.size(1), columns = V.size(2), rows = G.size(1);
  STD_TORCH_CHECK(G.size(0) == batch && G.size(2) == columns && damping.size(0) == batch,
                  "sherman_morrison: V (b, m, D), G (b, n, D) and damping (b) must agree");
  STD_TORCH_CHECK(rows > 0, "sherman_morrison: G must hold at least one row");
  STD_TORCH_CHECK(columns <= 1 || G.stride(2) == 1,
                  "sherman_morrison: rows of G must have unit stride");

  Tensor out = new_output("V", V, {batch, queries, columns});
  if (batch == 0 || queries == 0 || columns == 0) return out;
  const int64_t group = std::min(queries, kMaxQueries);
  const int64_t each = slab_rows(rows, group), slabs = (rows + each - 1) / each;
  const int64_t size = checked_product("V and G: their sums", {slabs + 1, group, columns, 4}) / 4;
  const auto totals = aligned_floats(size);
  const int64_t spare_size = type == RowType::kBf16 ? group * columns : 0;
  const auto spare = aligned_floats(worker_count(slabs) * spare_size);
  const Kernels& table = kernels();
  const auto* v = static_cast<const float*>(V.const_data_ptr());
  const auto* lam = static_cast<const float*>(damping.const_data_ptr());
  const auto* g = static_cast<const char*>(G.const_data_ptr());
  auto* result = static_cast<float*>(out.mutable_data_ptr());
  const int64_t width = static_cast<int64_t>(G.element_size());

  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t q = 0; q < queries; q += group) {
      const int64_t count = std::min(group, queries - q);
      const float* first = v + (b * queries + q) * columns;
      for_each_item(slabs, [&](int64_t s, int64_t worker) {
        const char* start = g + (b * G.stride(0) + s * each * G.stride(1)) * width;
        table.sherman_morrison_slab(
            {start, type, G.stride(1), std::min(each, rows - s * each), columns, first, count,
             lam[b], spare.get() + worker * spare_size, totals.get() + s * count * columns});
      });
      finish(totals.get(), slabs, count, columns, first, static_cast<double>(rows), lam[b],
             result + (b * queries + q) * columns);
    }
  }
  return out;
}

}  // namespace hyperinf

STABLE_TORCH_LIBRARY_IMPL(hyperinf, CPU, m) {
  m.impl("sherman_morrison", TORCH_BOX(&hyperinf::sherman_morrison));
}
