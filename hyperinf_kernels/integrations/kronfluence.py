"""kronfluence 1.0.1: HyperINF through its own EK-FAC scoring, by files and without a fork.

Kronfluence's scores are (n_query, n_train), positive helps; its task's loss should be a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..solvers import HyperINF
from ..store.files import atomic
from .factors import eigen_factors
from .imports import require

require("kronfluence", "kronfluence")

from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.module.utils import get_tracked_module_names
from kronfluence.utils.constants import (
    ACTIVATION_EIGENVALUES_NAME,
    ACTIVATION_EIGENVECTORS_NAME,
    FACTOR_ARGUMENTS_NAME,
    GRADIENT_EIGENVALUES_NAME,
    GRADIENT_EIGENVECTORS_NAME,
    LAMBDA_MATRIX_NAME,
    NUM_LAMBDA_PROCESSED,
)
from kronfluence.utils.save import save_json
from safetensors.torch import save_file

__all__ = ["score_arguments", "write_factors"]


def module_of(block: str) -> str:
    """A parameter's or a module's name as the module's."""
    return block.removesuffix(".weight")


def write_factors(
    analyzer: Any,
    factors_name: str,
    solver: HyperINF,
    module: Callable[[str], str] = module_of,
) -> Path:
    """Write a fitted HyperINF where `analyzer.compute_pairwise_scores(factors_name=...)` reads.

    Score with `score_args=score_arguments()`, because the damping is inside the factors.

    Args:
        analyzer: a kronfluence `Analyzer`.
        factors_name: a name not used before.
        solver: fitted on per-sample gradients of the analyzer's tracked modules, a bias as the last
            column of its weight.
        module: block name -> module name.

    Returns:
        The folder.

    Raises:
        InputError: factors of that name exist, the solver has none, or they are not those of the
            analyzer's tracked modules.
    """
    folder = Path(analyzer.factors_output_dir(factors_name=factors_name))
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"factors {factors_name!r} exist already in {folder}; take another name")
    factors = {module(name): found for name, found in eigen_factors(solver).items()}
    odd = sorted(set(factors) ^ set(get_tracked_module_names(analyzer.model)))
    if odd:
        where = "the analyzer does not track" if odd[0] in factors else "the solver has no block of"
        raise InputError(f"{where} module {odd[0]}")
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        ACTIVATION_EIGENVECTORS_NAME: {m: f.activation for m, f in factors.items()},
        GRADIENT_EIGENVECTORS_NAME: {m: f.gradient for m, f in factors.items()},
        # EK-FAC takes its spectrum from lambda_matrix alone, but expects these files
        ACTIVATION_EIGENVALUES_NAME: {m: f.eigenvalues[0] for m, f in factors.items()},
        GRADIENT_EIGENVALUES_NAME: {m: f.eigenvalues[:, 0] for m, f in factors.items()},
        LAMBDA_MATRIX_NAME: {m: f.eigenvalues for m, f in factors.items()},
        NUM_LAMBDA_PROCESSED: {m: torch.ones(1, dtype=torch.int64) for m in factors},
    }
    for name, table in tables.items():
        with atomic(folder / f"{name}.safetensors") as temporary:
            save_file({m: t.contiguous() for m, t in table.items()}, str(temporary))
    # written last: kronfluence takes a folder with arguments for a finished one
    save_json(
        FactorArguments(strategy="ekfac").to_dict(),
        folder / f"{FACTOR_ARGUMENTS_NAME}_arguments.json",
    )
    return folder


def score_arguments(**changes: Any) -> ScoreArguments:
    """kronfluence's `ScoreArguments` with no damping of its own.

    The factors are fp64; it scores in fp32 unless `score_dtype`, `per_sample_gradient_dtype` and
    `precondition_dtype` say otherwise.
    """
    return ScoreArguments(damping_factor=0.0, **changes)
