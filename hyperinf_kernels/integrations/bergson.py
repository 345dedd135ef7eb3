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
from ..solvers import HyperINF, Solver
from ..store.bergson import module_of, sizes
from ..store.files import atomic
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


def write_hessian(
    folder: str | Path,
    solver: HyperINF,
    module: Rename = module_of,
    *,
    index: str | Path | None = None,
) -> Path:
    """Write a fitted HyperINF as a factored Hessian that every bergson worker can load.

    Set `hessian_path=folder` and `inversion_cfg=inversion_config()`: the damping is inside, and the
    power -0.5 of unit-normalised scores is right as well. For gradients without projection.

    Args:
        module: block name -> module name, where `index` is not given.
        index: a folder that `bergson build` made of the same model. Blocks take its module names,
            and all of them must be there: a module that bergson does not find in a Hessian is
            scored without one, and nothing says so.

    Raises:
        InputError: a Hessian is there already, the solver has no factors, or they do not fit the
            index.
    """
    folder = Path(folder)
    if (folder / "eigen_activation_sharded").exists():
        raise InputError(f"{folder} holds a Hessian already")
    by_block = eigen_factors(solver)
    names = _named(by_block, index) if index is not None else {b: module(b) for b in by_block}
    factors = {names[block]: found for block, found in by_block.items()}
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
    folder: str | Path,
    solver: HyperINF,
    processor: Any,
    module: Rename = module_of,
    *,
    index: str | Path | None = None,
) -> Path:
    """Write HyperINF of a projected store as the dense Hessian that bergson checks and inverts.

    Its blocks are (p, p), so the GFIM is p x p where bergson's own is p^2 x p^2; this writes the
    damped p^2 x p^2 Kronecker product with the identity, which bergson inverts exactly.

    Args:
        solver: fitted on the store's rows as (p, p), see `hyperinf_kernels.store.bergson.read`.
        processor: the `GradientProcessor` of the store, whose projection settings are copied.
        module, index: as in `write_hessian`.
    """
    hessians = {}
    by_block = eigen_factors(solver)
    names = _named(by_block, index) if index is not None else {b: module(b) for b in by_block}
    for name, factors in by_block.items():
        E = factors.eigenvalues.flatten()
        Q = torch.kron(factors.gradient.contiguous(), factors.activation.contiguous())
        hessians[names[name]] = ((Q * E) @ Q.mT).float()
    dataclasses.replace(processor, hessians=hessians, hessians_eigen={}).save(Path(folder))
    return Path(folder)


def _named(factors: Mapping[str, EigenFactors], index: str | Path) -> dict[str, str]:
    """{block: module of the index}: the one that the block's name ends with, of the same size."""
    widths = sizes(index)[1]
    names = {}
    for block, found in factors.items():
        full = block.removesuffix(".weight")
        fitting = [m for m in widths if full == m or full.endswith(f".{m}")]
        if not fitting:
            raise InputError(f"{index} has no module for block {block}; it has {list(widths)[:2]}")
        names[block] = max(fitting, key=len)
        if widths[names[block]] != found.eigenvalues.numel():
            raise InputError(
                f"block {block} has {found.eigenvalues.numel()} numbers, module {names[block]} of "
                f"{index} has {widths[names[block]]}: projected gradients need write_dense_hessian"
            )
    missing = sorted(set(widths) - set(names.values()))
    if missing:
        raise InputError(f"the solver has no block for module {missing[0]} of {index}")
    return names


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
        """Modules without factors pass through, as with bergson's own.

        Raises:
            InputError: a module with factors is not among the gradients.
        """
        absent = sorted(set(self.factors) - set(grads))
        if absent:
            raise InputError(f"the gradients lack the module {absent[0]}; give module=")
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
