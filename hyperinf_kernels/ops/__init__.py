"""The Python face of every kernel: checked arguments, documented formulas, chosen backends."""

from . import composed as composed
from . import cpu as cpu
from . import cuda as cuda
from . import reference as reference
from .accumulate import gfim_accumulate_, gram_accumulate_
from .dispatch import BackendError, Plan, explain, trace_backends
from .per_sample import pairwise_dot, per_sample_dot, per_sample_grad, per_sample_norm_sq
from .row_products import row_dots, span, span_dots
from .schulz import schulz_inverse, schulz_solve
from .sherman_morrison import sherman_morrison
from .solve import SolveInfo
from .spd_inverse import spd_inverse
from .topk import topk_empty, topk_merge_
from .triton import entry as entry
from .triton import factors as factors

__all__ = [
    "BackendError",
    "Plan",
    "SolveInfo",
    "explain",
    "gfim_accumulate_",
    "gram_accumulate_",
    "pairwise_dot",
    "per_sample_dot",
    "per_sample_grad",
    "per_sample_norm_sq",
    "row_dots",
    "schulz_inverse",
    "schulz_solve",
    "sherman_morrison",
    "span",
    "span_dots",
    "spd_inverse",
    "topk_empty",
    "topk_merge_",
    "trace_backends",
]
