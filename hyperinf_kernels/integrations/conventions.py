"""How every host library writes influence down, and the conversion from and to ours.

Ours: influence[q, k] = -<V_q (C + lambda I)^-1, g_k>, C a mean over the training samples, gradients
of one sample's own loss, queries in rows. Negative helps. No two hosts agree on all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..errors import InputError
from ..solvers import Damping, as_damping

__all__ = ["HOSTS", "Convention", "own_loss", "table"]


@dataclass(frozen=True)
class Convention:
    """What one library means by a score matrix.

    Attributes:
        positive: what a positive score says about a training example.
        layout: which index comes first; "train_only" is one averaged query.
        curvature: "mean" over the samples, or their "sum" S, whose (S + lambda I)^-1 is 1/n times
            ours with lambda / n.
        loss: the loss whose gradient a sample has: its own ("sample"), or a "mean" over its batch
            of B, B times too small.
        damping: the host's own rule and default, in words.
        result: where and as what its scores come back.
    """

    positive: Literal["helps", "harms"]
    layout: Literal["query_major", "train_major", "train_only"]
    curvature: Literal["mean", "sum", "none"]
    loss: Literal["sample", "sum of tokens", "batch mean"]
    damping: str
    result: str

    def scores(self, ours: Tensor, n: int) -> Tensor:
        """Influence (m, n_scored) in our convention -> the host's scores.

        Args:
            n: training samples behind the curvature, which need not be those scored.
        """
        return self._scaled(ours, 1 / n if self.curvature == "sum" else 1.0, to_host=True)

    def influence(self, theirs: Tensor, n: int) -> Tensor:
        """The host's scores -> influence (m, n_scored) in our convention."""
        return self._scaled(theirs, n if self.curvature == "sum" else 1.0, to_host=False)

    def our_damping(self, theirs: Damping | float, n: int) -> Damping:
        """The host's damping as ours: a number x on a sum over n samples is x / n on the mean."""
        if isinstance(theirs, Damping):
            return theirs
        return as_damping(theirs / n if self.curvature == "sum" else theirs)

    def _scaled(self, values: Tensor, factor: float, to_host: bool) -> Tensor:
        if self.layout == "train_only":
            values = values.mean(0) if to_host and values.ndim == 2 else values
        elif values.ndim != 2:
            raise InputError(f"a score matrix has two dimensions, got {tuple(values.shape)}")
        elif self.layout == "train_major":
            values = values.mT
        return values * (factor if self.positive == "harms" else -factor)


def own_loss(
    grads: dict[str, Tensor], reduction: Literal["sum", "mean"], batch_size: int | None = None
) -> dict[str, Tensor]:
    """Per-sample gradients of each sample's own loss.

    Args:
        grads: {block: (B, ...)} as a host gives them.
        reduction: of the loss over the batch that was differentiated. "sum" changes nothing;
            "mean" divided every sample's gradient by the batch size, which is undone. There is no
            default: a wrong guess changes the damping by the square of the batch size.
        batch_size: of that batch; None: the number of rows.

    Raises:
        ValueError: unknown reduction.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    if reduction == "sum":
        return grads
    return {
        name: grad * (len(grad) if batch_size is None else batch_size)
        for name, grad in grads.items()
    }


HOSTS: dict[str, Convention] = {
    "HyperINF, DataInf (IFEngine)": Convention(
        "harms", "train_only", "mean", "sample", "mean(g^2) / lambda_const_param, default 10",
        "numpy, queries averaged",
    ),
    "HyperINF, DataInf (IFEngineGeneration)": Convention(
        "harms", "query_major", "mean", "sample", "mean(g^2) / lambda_const_param, default 10",
        "DataFrame",
    ),
    "pyDVL": Convention(
        "helps", "query_major", "mean", "sample", "absolute, no default", "tensor, or zarr",
    ),
    "dattri": Convention(
        "helps", "train_major", "mean", "sample", "absolute, default 0 (singular)",
        "fp32 tensor; ours keeps fp64",
    ),
    "dattri-llm": Convention(
        "helps", "train_major", "mean", "sum of tokens",
        "absolute 1e-3, or relative to the mean eigenvalue", "AttributionScore, fp32",
    ),
    "bergson": Convention(
        "helps", "train_major", "mean", "sum of tokens", "0.1 x mean eigenvalue, or absolute",
        "fp32 memmap on disk",
    ),
    "kronfluence": Convention(
        "helps", "query_major", "mean", "sum of tokens",
        "absolute 1e-8; None: 0.1 x mean eigenvalue",
        "safetensors",
    ),
    "captum": Convention(
        "helps", "query_major", "sum", "sample", "absolute hessian_reg 1e-3 on the sum",
        "tensor, or k-most pairs",
    ),
    "quanda": Convention(
        "helps", "query_major", "mean", "sample", "the wrapped explainer's", "tensor",
    ),
    "TRAK": Convention(
        "helps", "train_major", "sum", "sample",
        "absolute lambda_reg, default 0; scale lost by its rescaled inverse", "fp16 array",
    ),
    "LESS": Convention(
        "helps", "train_major", "none", "sample", "none", "fp32 tensor",
    ),
}  # fmt: skip


def table() -> str:
    """All hosts as a Markdown table; docs/drop-in.md holds it."""
    rows = ["| host | positive score | layout | curvature | gradient of | damping | result |"]
    rows.append("| --- | --- | --- | --- | --- | --- | --- |")
    words = {
        "query_major": "(query, train)", "train_major": "(train, query)", "train_only": "(train,)",
    }  # fmt: skip
    for host, c in HOSTS.items():
        cells = (
            host, c.positive, words[c.layout], c.curvature, c.loss, c.damping, c.result,
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
