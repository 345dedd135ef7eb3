// Compiled once per instruction set (setup.py): fills that set's table of kernels.
#include "cpu/kernels.h"

#include "hyperinf/gram.h"
#include "hyperinf/row_products.h"
#include "hyperinf/row_sketch.h"
#include "hyperinf/schulz.h"
#include "hyperinf/schulz_adaptive.h"
#include "hyperinf/sherman_morrison.h"
#include "hyperinf/sketch.h"
#include "hyperinf/spd_inverse.h"
#include "hyperinf/thin.h"

namespace hyperinf::HYPERINF_ISA {

extern const Kernels kTable;

static void slab(const SlabArgs& a) { sherman_morrison_slab(a); }

static void dots(const DotArgs& a) {
  if (a.type == RowType::kBf16)
    dot_block<Bf16>(a);
  else
    dot_block<float>(a);
}

static void sums(const SumArgs& a) {
  if (a.type == RowType::kBf16)
    sum_slice<Bf16>(a);
  else
    sum_slice<float>(a);
}

static void gram(const GramArgs& a) {
  if (a.type == RowType::kFloat) return gram_tile<float, float>(a);
#ifdef HYPERINF_BF16_DOT
  gram_tile_pairs(a);
#else
  gram_tile<float, Bf16>(a);
#endif
}

static void gram64(const GramArgs& a) {
  if (a.type == RowType::kBf16)
    gram_tile<double, Bf16>(a);
  else if (a.type == RowType::kDouble)
    gram_tile<double, double>(a);
  else
    gram_tile<double, float>(a);
}

static void combine(const SketchArgs& a) {
  if (a.type == RowType::kBf16)
    combine_rows<Bf16>(a);
  else
    combine_rows<float>(a);
}

static void image(const SketchArgs& a) {
  if (a.type == RowType::kBf16)
    image_rows<Bf16>(a);
  else
    image_rows<float>(a);
}

static void seen(const SeenArgs& a) {
  if (a.type == RowType::kBf16)
    seen_slice<Bf16>(a);
  else
    seen_slice<float>(a);
}

static void thin(const ThinArgs& a) {
  if (a.type == RowType::kBf16)
    thin_product<Bf16>(a);
  else
    thin_product<float>(a);
}

const Kernels kTable = {kLanes,           slab,  dots, sums,      gram,   gram64,
                        combine,          image, seen, thin, block_dot, schulz, schulz_adaptive,
                        spd_inverse_lanes};

}  // namespace hyperinf::HYPERINF_ISA
