"""bergson 2.5.1: HyperINF in its scoring, by files that its workers read, or in process.

bergson's scores are (n_train, n_query), positive helps. Its gradients are (O, I) per module,
flattened row by row, a bias last; its default loss is a sum over tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from ..files import atomic
from ..solvers import HyperINF, Solver
from .factors import EigenFactors, eigen_factors
from .imports import require
from .layout import LORA_B

require("bergson", "bergson")

import bergson.builder
import bergson.query.attributor
import bergson.score.score
from bergson.config import InversionConfig

__all__ = [
    "HyperINFPreconditioner", "SolverPreconditioner", "inversion_config", "preconditioning",
    "write_dense_hessian", "write_hessian",
]  # fmt: skip

Rename = Callable[[str], str]
PLACES = (bergson.builder, bergson.score.score, bergson.query.attributor)


def module_of(block: str) -> str:
    """A parameter's or a module's name as bergson's module name."""
    return block.removesuffix(".weight")


def write_hessian(folder: str | Path, solver: HyperINF, module: Rename = module_of) -> Path:
    """Write a fitted HyperINF as a factored Hessian that every bergson worker can load.

    Set `hessian_path=folder` and `inversion_cfg=inversion_config()`: the damping is inside, and the
    power -0.5 of unit-normalised scores is right as well. For gradients without projection.

    Raises:
        InputError: a Hessian is there already, or the solver has no factors.
    """
    folder = Path(folder)
    if (folder / "eigen_activation_sharded").exists():
        raise InputError(f"{folder} holds a Hessian already")
    factors = {module(name): found for name, found in eigen_factors(solver).items()}
    # bergson knows a factored Hessian by the activation folder, so that one comes last
    for part, kind in (("eigenvalue", "eigenvalues"), ("eigen_gradient", "gradient"),
                       ("eigen_activation", "activation")):  # fmt: skip
        shard = folder / f"{part}_sharded" / "shard_0.safetensors"
        shard.parent.mkdir(parents=True, exist_ok=True)
        table = {m: getattr(f, kind).float().contiguous() for m, f in factors.items()}
        with atomic(shard) as temporary:
            save_file(table, str(temporary))
    return folder


def write_dense_hessian(
    folder: str | Path, solver: HyperINF, processor: Any, module: Rename = module_of
) -> Path:
    """Write HyperINF of a projected store as the dense Hessian that bergson checks and inverts.

    Its blocks are (p, p), so the GFIM is p x p where bergson's own is p^2 x p^2; this writes the
    damped p^2 x p^2 Kronecker product with the identity, which bergson inverts exactly.

    Args:
        solver: fitted on the store's rows as (p, p), see `hyperinf_kernels.store.bergson.read`.
        processor: the `GradientProcessor` of the store, whose projection settings are copied.
    """
    hessians = {}
    for name, factors in eigen_factors(solver).items():
        E = factors.eigenvalues.flatten()
        Q = torch.kron(factors.gradient.contiguous(), factors.activation.contiguous())
        hessians[module(name)] = ((Q * E) @ Q.mT).float()
    dataclasses.replace(processor, hessians=hessians, hessians_eigen={}).save(Path(folder))
    return Path(folder)


def inversion_config() -> InversionConfig:
    """bergson's inversion without a damping of its own."""
    return InversionConfig(inversion="absolute_damped_inverse", damping_factor=0.0)


class HyperINFPreconditioner:
    """bergson's Preconditioner protocol: `apply({module: (n, O I)})` -> H^power of each row."""

    def __init__(self, solver: HyperINF, power: float = -1.0, module: Rename = module_of) -> None:
        self.factors: dict[str, EigenFactors] = {
            module(name): found for name, found in eigen_factors(solver).items()
        }
        self.power = power

    def apply(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Modules without factors pass through, as with bergson's own."""
        out = {}
        for name, flat in grads.items():
            factors = self.factors.get(name)
            if factors is None:
                out[name] = flat
                continue
            G = flat.reshape(len(flat), *factors.eigenvalues.shape)
            out[name] = factors.apply(G, self.power).reshape(flat.shape)
        return out


class SolverPreconditioner:
    """The same protocol for any fitted solver, with H^-1 only.

    Args:
        shapes: {module: (O, I)}.
    """

    def __init__(
        self, solver: Solver, shapes: Mapping[str, tuple[int, int]], module: Rename = module_of
    ) -> None:
        self.solver, self.shapes = solver, shapes
        self.blocks = {module(name): name for name in solver.blocks}
        missing = sorted(set(self.blocks) - set(shapes))
        if missing:
            raise InputError(f"shapes lacks the module {missing[0]}")

    def apply(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Modules that were not fitted pass through."""
        absent = sorted(set(self.blocks) - set(grads))
        if absent:
            raise InputError(f"the gradients lack the module {absent[0]}")
        queries = {}
        for name, block in self.blocks.items():
            G = grads[name].reshape(len(grads[name]), *self.shapes[name])
            queries[block] = G.mT if LORA_B.search(block) else G
        applied = self.solver.apply(queries)
        out = dict(grads)
        for name, block in self.blocks.items():
            W = applied[block].mT if LORA_B.search(block) else applied[block]
            out[name] = W.reshape(grads[name].shape).to(grads[name].dtype)
        return out


@contextlib.contextmanager
def preconditioning(solver: Solver, shapes: Mapping[str, tuple[int, int]] | None = None,
                    module: Rename = module_of) -> Iterator[None]:  # fmt: skip
    """Within this block bergson preconditions with a fitted solver, in this process only.

    bergson's multi-GPU runs start processes of their own, which read files: use `write_hessian`.

    Args:
        shapes: {module: (O, I)}, needed unless the solver is a HyperINF.
    """

    def load(hessian_path: Any, *, power: float | None = -1.0, **_: Any) -> Any:
        if power is None:
            return None
        if isinstance(solver, HyperINF):
            return HyperINFPreconditioner(solver, power, module)
        if power != -1.0:
            raise InputError("unit-normalised scores need H^-0.5, which only HyperINF gives here")
        return SolverPreconditioner(solver, shapes or {}, module)

    before = [place.load_preconditioner for place in PLACES]
    try:
        for place in PLACES:
            place.load_preconditioner = load
        yield
    finally:
        for place, original in zip(PLACES, before, strict=True):
            place.load_preconditioner = original
