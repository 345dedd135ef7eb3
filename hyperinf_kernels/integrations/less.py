"""LESS: its selection scores with our preconditioners, on the gradient files that it writes.

LESS itself is a set of scripts; its files are read by `hyperinf_kernels.store.arrays.read_less`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..solvers import Damping, make_solver

__all__ = ["calculate_influence_score", "selection_scores"]


def calculate_influence_score(
    training_info: Tensor,
    validation_info: Tensor,
    method: str = "grad_dot",
    damping: Damping | float | None = None,
) -> Tensor:
    """LESS's function of that name: (n, p), (m, p) -> (n, m), larger selects.

    With "grad_dot" LESS's own product of unit-normalised rows; "exact", "datainf" and the others
    precondition the validation rows by the training rows' Fisher.

    Raises:
        InputError: rows of different length.
    """
    if training_info.ndim != 2 or training_info.shape[1:] != validation_info.shape[1:]:
        raise InputError(
            "training and validation gradients must be (n, p) and (m, p), got "
            f"{tuple(training_info.shape)} and {tuple(validation_info.shape)}"
        )
    train = training_info if training_info.dtype == torch.float64 else training_info.float()
    query = validation_info.to(train.dtype)
    solver = make_solver(method, damping)
    solver.update({"all": train[:, None]}, copy=False)
    return train @ solver.fit().apply({"all": query[:, None]})["all"][:, 0].mT


def selection_scores(scores: Tensor, subtask: Sequence[int] | Tensor) -> Tensor:
    """LESS's score per training sample: the largest over subtasks of the mean over its queries.

    Args:
        scores: (n, m). subtask: of every query, (m,).
    """
    groups = torch.as_tensor(subtask)
    if groups.shape != (scores.shape[1],):
        raise InputError(f"subtask has shape {tuple(groups.shape)} for {scores.shape[1]} queries")
    means = [scores[:, groups == group].mean(1) for group in groups.unique()]
    return torch.stack(means).amax(0)
