"""Fast, certified influence functions for LoRA-tuned models.

Public names are imported on first use, so `import hyperinf_kernels` costs little more than torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ops": (
        "BackendError", "Plan", "SolveInfo", "explain", "gfim_accumulate_", "gram_accumulate_",
        "pairwise_dot", "per_sample_dot", "per_sample_grad", "per_sample_norm_sq",
        "schulz_inverse", "schulz_solve", "sherman_morrison", "spd_inverse", "trace_backends",
    ),
    "solvers": (
        "AbsoluteDamping", "BlockReport", "CG", "Damping", "DataInf", "DataInfDamping", "EKFAC",
        "Exact", "GradDot", "GramEngine", "GramScores", "HyperINF", "KFAC", "LiSSA", "TraceDamping",
    ),
    "gradients": (
        "CausalLM", "MaskedLM", "Seq2SeqLM", "SequenceClassification", "TokenClassification",
        "per_sample_gradients",
    ),
    "attribution": ("Attributor", "InfluenceScores", "influence"),
    "errors": ("InputError",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
