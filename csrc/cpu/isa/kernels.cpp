// Compiled once per instruction set (setup.py): fills that set's table of kernels.
#include "cpu/kernels.h"

#include "hyperinf/gram.h"
#include "hyperinf/sherman_morrison.h"
#include "hyperinf/spd_inverse.h"

namespace hyperinf::HYPERINF_ISA {

extern const Kernels kTable;

static void slab(const SlabArgs& a) {
  if (a.type == RowType::kBf16)
    sherman_morrison_slab(static_cast<const Bf16*>(a.rows), a);
  else
    sherman_morrison_slab(static_cast<const float*>(a.rows), a);
}

static void gram(const GramArgs& a) {
  if (a.type == RowType::kBf16)
    gram_tile<Bf16>(a);
  else
    gram_tile<float>(a);
}

const Kernels kTable = {kLanes, slab, gram, spd_inverse_lanes};

}  // namespace hyperinf::HYPERINF_ISA
