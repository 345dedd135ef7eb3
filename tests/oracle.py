"""The truth in fp64: every formula as its definition reads, in numpy and with explicit loops.

Nothing here comes from the package under test. Where a quantity has two independent derivations,
both are given, and `test_oracle.py` holds them against each other. Tensors are read as fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def f64(values: Any) -> Array:
    """Array or tensor -> fp64 array; bf16 tensors too, which numpy cannot read by itself."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.array(values, dtype=np.float64)


# --- per-sample gradients: delta (..., T, O), act (..., T, I), g = sum_t delta_t act_t^T --------


def per_sample_grad(delta: Any, act: Any) -> Array:
    """(..., T, O), (..., T, I) -> (..., O, I), one outer product per token."""
    delta, act = f64(delta), f64(act)
    lead, tokens = delta.shape[:-2], delta.shape[-2]
    grads = np.zeros((*lead, delta.shape[-1], act.shape[-1]))
    for index in np.ndindex(*lead):
        for t in range(tokens):
            grads[index] += np.outer(delta[index][t], act[index][t])
    return grads


def per_sample_norm_sq(delta: Any, act: Any) -> Array:
    """(..., T, O), (..., T, I) -> (...): squared Frobenius norm of each gradient."""
    grads = per_sample_grad(delta, act)
    norms = np.zeros(grads.shape[:-2])
    for index in np.ndindex(*norms.shape):
        norms[index] = np.sum(grads[index] ** 2)
    return norms


def per_sample_dot(delta: Any, act: Any, v: Any) -> Array:
    """V (m, O, I) -> (..., m); V (O, I) -> (...): inner products of each gradient with V."""
    grads, v = per_sample_grad(delta, act), f64(v)
    rows = v[None] if v.ndim == 2 else v
    dots = np.zeros((*grads.shape[:-2], len(rows)))
    for index in np.ndindex(*grads.shape[:-2]):
        for j, row in enumerate(rows):
            dots[(*index, j)] = np.vdot(grads[index], row)
    return dots[..., 0] if v.ndim == 2 else dots


def pairwise_dot(delta1: Any, act1: Any, delta2: Any, act2: Any) -> Array:
    """(B1, T1, O), (B1, T1, I), (B2, T2, O), (B2, T2, I) -> (B1, B2)."""
    first, second = per_sample_grad(delta1, act1), per_sample_grad(delta2, act2)
    dots = np.zeros((len(first), len(second)))
    for i, g in enumerate(first):
        for j, h in enumerate(second):
            dots[i, j] = np.vdot(g, h)
    return dots


def pairwise_dot_by_tokens(delta1: Any, act1: Any, delta2: Any, act2: Any) -> Array:
    """The same without any gradient: sum over token pairs of (delta_s . delta_t)(act_s . act_t)."""
    delta1, act1, delta2, act2 = f64(delta1), f64(act1), f64(delta2), f64(act2)
    dots = np.zeros((len(delta1), len(delta2)))
    for i in range(len(delta1)):
        for j in range(len(delta2)):
            dots[i, j] = np.sum((delta1[i] @ delta2[j].T) * (act1[i] @ act2[j].T))
    return dots


# --- curvature ----------------------------------------------------------------------------------


def gfim_sum(grads: Any, side: str = "cols") -> Array:
    """(B, r, d) -> sum_b g_b^T g_b (d, d) for "cols", sum_b g_b g_b^T (r, r) for "rows"."""
    grads = f64(grads)
    size = grads.shape[-1] if side == "cols" else grads.shape[-2]
    total = np.zeros((size, size))
    for g in grads:
        total += g.T @ g if side == "cols" else g @ g.T
    return total


def gfim(grads: Any, side: str = "cols") -> Array:
    """Mean over the samples of g^T g or g g^T; no further 1/r."""
    return gfim_sum(grads, side) / len(grads)


def flatten(grads: Any) -> Array:
    """(n, r, d) -> (n, r d)."""
    grads = f64(grads)
    return grads.reshape(len(grads), grads.shape[1] * grads.shape[2])


def fisher(rows: Any) -> Array:
    """(n, D) -> flattened empirical Fisher (D, D): mean of outer products of the rows."""
    rows = f64(rows)
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for g in rows:
        total += np.outer(g, g)
    return total / len(rows)


def gram(first: Any, second: Any | None = None) -> Array:
    """(n1, D), (n2, D) -> (n1, n2) dot products, one by one; `second` defaults to `first`."""
    first = f64(first)
    second = first if second is None else f64(second)
    dots = np.zeros((len(first), len(second)))
    for i, g in enumerate(first):
        for j, h in enumerate(second):
            dots[i, j] = np.dot(g, h)
    return dots


def curvature(grads: Any, kind: str) -> Array:
    """Undamped matrix that a method inverts: GFIM ("cols", "rows") or the "flat" Fisher."""
    return fisher(flatten(grads)) if kind == "flat" else gfim(grads, kind)


@dataclass(frozen=True)
class Damping:
    """Sum of three rules; each coefficient of zero switches its rule off."""

    datainf: float = 0.0
    absolute: float = 0.0
    trace: float = 0.0

    def of(self, grads: Any, kind: str) -> float:
        """datainf * mean(g^2) + absolute + trace * (mean eigenvalue of the undamped curvature)."""
        mean_square = float(np.mean(f64(grads) ** 2))
        eigenvalues = np.linalg.eigvalsh(curvature(grads, kind))
        return self.datainf * mean_square + self.absolute + self.trace * float(eigenvalues.mean())


def damped(matrix: Array, lam: float) -> Array:
    return matrix + lam * np.eye(len(matrix))


def spectral(matrix: Array, function: Callable[[Array], Array]) -> Array:
    """f(A) of a symmetric matrix from its eigenvalues."""
    mu, basis = np.linalg.eigh(matrix)
    return (basis * function(mu)) @ basis.T


# --- directions W that take the place of V A^-1 -------------------------------------------------


def datainf(queries: Any, rows: Any, lam: float) -> Array:
    """(m, D), (n, D) -> (m, D): mean over i of (g_i g_i^T + lam I)^-1 v by Sherman-Morrison."""
    queries, rows = f64(queries), f64(rows)
    directions = np.zeros_like(queries)
    for q, v in enumerate(queries):
        for g in rows:
            directions[q] += (v - np.dot(v, g) / (lam + np.dot(g, g)) * g) / lam
        directions[q] /= len(rows)
    return directions


def datainf_by_inverses(queries: Any, rows: Any, lam: float) -> Array:
    """The same from the mean of n explicit D x D inverses."""
    queries, rows = f64(queries), f64(rows)
    inverses = [np.linalg.inv(damped(np.outer(g, g), lam)) for g in rows]
    return queries @ np.mean(inverses, axis=0)


def exact(queries: Any, rows: Any, lam: float) -> Array:
    """(m, D), (n, D) -> (m, D): dense solve with the damped flattened Fisher."""
    return np.linalg.solve(damped(fisher(rows), lam), f64(queries).T).T


def exact_scores_by_gram(queries: Any, rows: Any, lam: float) -> Array:
    """Influence (m, n) of the exact method from dot products alone: -n L (K + n lam I)^-1."""
    rows = f64(rows)
    n = len(rows)
    return -n * np.linalg.solve(damped(gram(rows), n * lam), gram(queries, rows).T).T


def lissa(queries: Any, rows: Any, lam: float, scale: float, steps: int) -> Array:
    """r <- s v + (I - s A) r from r = 0, `steps` times."""
    matrix, queries = damped(fisher(rows), lam), f64(queries)
    directions = np.zeros_like(queries)
    for _ in range(steps):
        directions = scale * queries + directions - scale * directions @ matrix
    return directions


def lissa_by_filter(queries: Any, rows: Any, lam: float, scale: float, steps: int) -> Array:
    """The same in closed form: (1 - (1 - s mu)^k) / mu on the spectrum."""
    matrix = damped(fisher(rows), lam)
    return f64(queries) @ spectral(matrix, lambda mu: (1 - (1 - scale * mu) ** steps) / mu)


def apply_side(queries: Any, inverse: Array, side: str) -> Array:
    """(m, r, d) -> V X per query for "cols" (X d x d), X V for "rows" (X r x r)."""
    return np.stack([v @ inverse if side == "cols" else inverse @ v for v in f64(queries)])


def hyperinf(queries: Any, grads: Any, lam: float, side: str = "cols") -> Array:
    """(m, r, d), (n, r, d) -> (m, r, d): V (C + lam I)^-1, or (C + lam I)^-1 V for "rows"."""
    matrix = damped(gfim(grads, side), lam)
    if side == "cols":
        return np.stack([np.linalg.solve(matrix, v.T).T for v in f64(queries)])
    return np.stack([np.linalg.solve(matrix, v) for v in f64(queries)])


def hyperinf_both(queries: Any, grads: Any, lam: float) -> Array:
    """(m, r, d): solve with the Kronecker product of both damped sides, formed as (r d) x (r d)."""
    queries = f64(queries)
    r, d = queries.shape[1:]
    trace = float(np.mean(np.sum(f64(grads) ** 2, axis=(1, 2))))
    rows = damped(gfim(grads, "rows") / np.sqrt(trace), np.sqrt(lam * d / r))
    cols = damped(gfim(grads, "cols") / np.sqrt(trace), np.sqrt(lam * r / d))
    return np.linalg.solve(np.kron(rows, cols), flatten(queries).T).T.reshape(queries.shape)


def paper_inverse(matrix: Any, steps: int, start: float) -> Array:
    """Published iteration X <- X (2 I - A X) from X = start * I, `steps` times, no stop test."""
    matrix = f64(matrix)
    identity = np.eye(len(matrix))
    inverse = start * identity
    for _ in range(steps):
        inverse = inverse @ (2 * identity - matrix @ inverse)
    return inverse


def paper_filter(mu: Any, steps: int, start: float) -> Array:
    """(1 - (1 - a mu)^(2^k)) / mu without cancellation; a 2^k where mu = 0."""
    mu = f64(mu)
    gains = np.full_like(mu, start * 2.0**steps)
    for index in np.ndindex(*mu.shape):
        x = start * mu[index]
        if x == 0:
            continue
        with np.errstate(divide="ignore"):  # a perfect start, x = 1, has log 0
            log_factor = np.log1p(-x) if x < 0.5 else np.log(np.abs(1 - x))
        with np.errstate(over="ignore"):  # a mu > 2 diverges, as published
            gains[index] = -np.expm1(2.0**steps * log_factor) / mu[index]
    return gains


def paper_inverse_by_filter(matrix: Any, steps: int, start: float) -> Array:
    """The published iteration in closed form, on the spectrum."""
    return spectral(f64(matrix), lambda mu: paper_filter(mu, steps, start))


def hyperinf_paper(
    queries: Any, grads: Any, lam: float, steps: int, start: float = 5e-5, side: str = "cols"
) -> Array:
    """(m, r, d): V X_k, X_k from the published iteration; `lam` includes any extra damping."""
    matrix = damped(gfim(grads, side), lam)
    return apply_side(queries, paper_inverse_by_filter(matrix, steps, start), side)


# --- Kronecker-factored curvature, with every matrix written out ---------------------------------


def kfac_matrix(rows: Any, cols: Any) -> Array:
    """(r, r), (d, d) -> K-FAC's Fisher (r d, r d) of row-major flattened gradients."""
    return np.kron(f64(rows), f64(cols))


def ekfac_matrix(grads: Any, rows: Any, cols: Any) -> Array:
    """The gradients' Fisher with everything off the diagonal dropped in K-FAC's eigenbasis."""
    basis = np.kron(np.linalg.eigh(f64(rows))[1], np.linalg.eigh(f64(cols))[1])
    return (basis * np.diag(basis.T @ fisher(flatten(grads)) @ basis)) @ basis.T


def gradient_factors(grads: Any) -> tuple[Array, Array]:
    """Second moments of both sides of the gradients, over their common trace."""
    rows, cols = gfim(grads, "rows"), gfim(grads, "cols")
    return rows, cols / np.trace(cols)


def scores_with(
    matrix: Array, lam: float, grads: Any, queries: Any, dtype: type = np.float64
) -> Array:
    """(m, n): -V (F + lam I)^-1 P^T of one block, the solve and the dot products in `dtype`."""
    a, v, p = (x.astype(dtype) for x in (damped(matrix, lam), flatten(queries), flatten(grads)))
    return -np.linalg.solve(a, v.T).T @ p.T


# --- influence over blocks ----------------------------------------------------------------------

CURVATURE_OF = {"datainf": "flat", "exact": "flat", "lissa": "flat", "hyperinf": "cols"}


def directions(grads: Any, queries: Any, method: str, lam: float = 0.0, **options: Any) -> Array:
    """(n, r, d), (m, r, d) -> (m, r, d) for one block and one method."""
    grads, queries = f64(grads), f64(queries)
    if method == "grad_dot":
        return queries
    if method == "hyperinf":
        return hyperinf(queries, grads, lam, **options)
    if method == "hyperinf_paper":
        return hyperinf_paper(queries, grads, lam, **options)
    flat_method = {"datainf": datainf, "exact": exact, "lissa": lissa}[method]
    rows = flat_method(flatten(queries), flatten(grads), lam, **options)
    return rows.reshape(queries.shape)


def influence(
    train: Mapping[str, Any],
    query: Mapping[str, Any],
    method: str,
    damping: Damping | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Array:
    """{block: (n, r, d)}, {block: (m, r, d)} -> (m, n): -sum over blocks of <W_q, g_k>.

    `options` holds per block what its method needs beyond the damping (LiSSA's scale differs).
    """
    damping = Damping(datainf=0.1) if damping is None else damping
    total: Array | None = None
    for block, grads in train.items():
        grads = f64(grads)
        chosen = dict(options[block]) if options else {}
        kind = chosen.get("side", "cols") if "hyperinf" in method else CURVATURE_OF.get(method)
        lam = 0.0 if kind is None else damping.of(grads, kind) + chosen.pop("extra", 0.0)
        w = directions(grads, query[block], method, lam, **chosen)
        scores = np.zeros((len(w), len(grads)))
        for q in range(len(w)):
            for k in range(len(grads)):
                scores[q, k] = -np.vdot(w[q], grads[k])
        total = scores if total is None else total + scores
    if total is None:
        raise ValueError("no blocks")
    return total


def angle(first: Any, second: Any) -> float:
    """Degrees between two arrays read as vectors; by the half-angle form, exact near zero."""
    a, b = f64(first).ravel(), f64(second).ravel()
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return float(np.degrees(2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))))


# --- inverses -----------------------------------------------------------------------------------


def spd(eigenvalues: Any, seed: int) -> Array:
    """Symmetric matrix with the given spectrum and a random orthogonal basis."""
    mu = f64(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(mu), len(mu))))
    matrix = (basis * mu) @ basis.T
    return (matrix + matrix.T) / 2


def solve(matrix: Any, v: Any) -> Array:
    """V A^-1 per matrix of the batch, (..., m, d): fp64 solves refined on extended residuals.

    A plain fp64 solve is itself off by the roundoff times the condition number, which is all the
    error that an fp64 result under test may have.
    """
    matrix, v = f64(matrix), f64(v)
    wide_matrix, wide_v = matrix.astype(np.longdouble), v.astype(np.longdouble)
    solution = np.zeros_like(wide_v)
    for _ in range(5):
        gap = (wide_v - solution @ wide_matrix).astype(np.float64)
        solution += np.swapaxes(np.linalg.solve(matrix, np.swapaxes(gap, -1, -2)), -1, -2)
    return solution.astype(np.float64)


def inverse(matrix: Any) -> Array:
    """A^-1 per matrix of the batch, refined in the same way."""
    matrix = f64(matrix)
    return solve(matrix, np.broadcast_to(np.eye(matrix.shape[-1]), matrix.shape))


def inverse_residual(matrix: Any, inverse: Any) -> Array:
    """||I - A X||_F / ||I||_F per matrix of the batch."""
    matrix, inverse = f64(matrix), f64(inverse)
    identity = np.eye(matrix.shape[-1])
    gap = identity - matrix @ inverse
    return np.linalg.norm(gap, axis=(-2, -1)) / np.linalg.norm(identity)


def solve_residual(matrix: Any, v: Any, w: Any) -> Array:
    """||V - W A||_F / ||V||_F per matrix of the batch."""
    matrix, v, w = f64(matrix), f64(v), f64(w)
    return np.linalg.norm(v - w @ matrix, axis=(-2, -1)) / np.linalg.norm(v, axis=(-2, -1))


# --- comparison ---------------------------------------------------------------------------------


def assert_as_exact_as(
    actual: Any, expected: Any, peer: Any, *, k: float, floor: float, what: str = "result"
) -> None:
    """Largest error of `actual` <= k x largest error of `peer` + floor x largest |expected|.

    `peer` is the same expression computed naively in the accumulation type, so the bound follows
    the conditioning of the problem; `floor` only covers a peer that happens to be exact.
    """
    actual, expected, peer = f64(actual), f64(expected), f64(peer)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    assert peer.shape == expected.shape, f"peer of {what}: {peer.shape}, not {expected.shape}"
    if expected.size == 0:
        return
    error, peer_error = np.max(np.abs(actual - expected)), np.max(np.abs(peer - expected))
    bound = k * peer_error + floor * np.max(np.abs(expected))
    assert error <= bound, (
        f"{what}: error {error:.3e} > {bound:.3e} ({k:g} x {peer_error:.3e} + floor)"
    )


def naming(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Pattern of a message that names one of these arguments and its shape, in any brackets."""
    options = []
    for name, shape in shapes.items():
        printed = ", ".join(str(size) for size in shape) + ",?"
        options.append(rf"(?=.*\b{name}\b)(?=.*[\[(]{printed}[\])])")
    return f"(?s)({'|'.join(options)})"
