"""traker 0.3.2: a score computer, so that `TRAKer` scores with a certified inverse.

TRAK's curvature is a sum over the training set and its inverse is rescaled, so its scores have no
scale; `rescale=False` gives -1/n times ours: (n_train, n_targets), positive helps.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import spd_inverse
from ..solvers import Damping, make_solver
from .imports import require

require("trak", "trak")

from trak.score_computers import AbstractScoreComputer

__all__ = ["ScoreComputer"]


class ScoreComputer(AbstractScoreComputer):
    """`TRAKer(..., score_computer=ScoreComputer)`; `functools.partial` sets options.

    Args:
        dtype, device, logging_level, lambda_reg: given by TRAKer; `lambda_reg` is a damping on
            X^T X, the sum.
        method: "exact" inverts X^T X + lambda I as TRAK does; "datainf" and the others as named.
        damping: overrides `lambda_reg` by a rule on the mean, such as `DataInfDamping(0.1)`.
        rescale: divide the inverse by its mean magnitude, as TRAK does to keep fp16 in range.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        logging_level: int = logging.INFO,
        lambda_reg: float = 0.0,
        *,
        method: str = "exact",
        damping: Damping | None = None,
        rescale: bool = True,
        **_: Any,
    ) -> None:
        super().__init__(dtype, device)
        self.lambda_reg, self.method, self.damping = float(lambda_reg), method, damping
        self.rescale = rescale
        self.report: list[Any] = []

    def get_xtx(self, grads: Tensor) -> Tensor:
        """X^T X (p, p) in fp32; the features below use the rows themselves."""
        rows = grads.float()
        return rows.mT @ rows

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        """X (X^T X + lambda I)^-1, (n, p)."""
        rows = grads.float()
        inverse = self._inverse(rows)
        if self.rescale:
            inverse /= inverse.abs().mean()
        features = (rows.double() @ inverse).to(self.dtype)
        if not bool(torch.isfinite(features).all()):
            raise InputError(f"the features do not fit into {self.dtype}; set rescale=True")
        return features.to(self.device)

    def _inverse(self, rows: Tensor) -> Tensor:
        """(X^T X + lambda I)^-1 of any method, (p, p) in fp64."""
        eye = torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device)
        if self.method == "exact" and self.damping is None and self.lambda_reg == 0:
            X = rows.double()
            try:
                inverse, info = spd_inverse(X.mT @ X, return_info=True)
                regular = bool(torch.as_tensor(info.converged).all())
            except ValueError:
                regular = False
            if not regular:
                raise InputError(
                    f"X^T X of {len(rows)} rows is singular in {rows.shape[1]} dimensions; give "
                    "TRAKer a positive lambda_reg or a smaller proj_dim"
                )
            return inverse
        rule = self.damping if self.damping is not None else self.lambda_reg / len(rows)
        solver = make_solver(self.method, rule)
        solver.update({"all": rows[:, None]}, copy=False)
        inverse = solver.fit().apply({"all": eye[:, None]})["all"][:, 0] / len(rows)
        self.report = solver.report()
        return inverse

    def get_scores(self, features: Tensor, target_grads: Tensor, accumulator: Tensor) -> None:
        scores = features.float() @ target_grads.float().to(features.device).mT
        accumulator += scores.cpu().to(accumulator.dtype)
