"""Linear systems A x = b by A-conjugate directions from any proposer: CG, preconditioned, deflated, or a network's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LinearSolveResult", "conjugate_directions"]


@dataclass(frozen=True)
class LinearSolveResult:
    """Where a solve ended.

    Attributes:
        x: the solution, of b's shape.
        iterations: steps taken; of a batch, until its last system was solved.
        converged: whether every system reached the tolerance.
        residuals: ||b - A x_k|| / ||b - A x_0|| of each k, of a batch the largest.
        restarts: steps in which a proposal was of no use and the residual stood in for it.
    """

    x: Tensor
    iterations: int
    converged: bool
    residuals: list[float]
    restarts: int


@torch.no_grad()
def conjugate_directions(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    propose: Callable[[Tensor], Tensor] | None = None,
    deflation: Tensor | None = None,
    x0: Tensor | None = None,
    tolerance: float = 1e-4,
    absolute_tolerance: float = 0.0,
    max_iterations: int = 200,
    keep: int = 2,
    normalize: bool = True,
    recompute_every: int = 0,
    batched: bool = False,
    callback: Callable[[int, Tensor], None] | None = None,
) -> LinearSolveResult:
    """Solves A x = b for a symmetric positive definite A, each step along a proposed direction.

        q   = propose(r_k / ||r_k||)
        d_k = q - sum_{j of the last `keep`} (q^T A d_j / d_j^T A d_j) d_j
        x_{k+1} = x_k + (d_k^T r_k / d_k^T A d_k) d_k

    Source: "A Deep Conjugate Direction Method for Iteratively Solving Linear Systems" (arXiv:2205.10763), Algorithm 1.
    The step is exact in the A-norm, so that norm of the error never rises, whatever is proposed. Without a proposer
    it is the conjugate gradient method; with a fixed linear one, preconditioned CG; with a network, the paper's DCDM.
    With `deflation` every direction is also made A-orthogonal to fixed vectors, which is deflated (preconditioned) CG.
    A proposal of no use (none left after the orthogonalisation, or at a right angle to r) is replaced by the residual.

    Inner products are float64; float32 systems stall at a relative residual near 1e-6.

    Args:
        matvec: A: a tensor of b's shape to another.
        b: floating, finite, any shape; with `batched` the first dimension counts systems, solved side by side, each
            with its own inner products, as they would be alone.
        propose: a residual of b's shape to a direction; None proposes the residual.
        deflation: (m, *shape of one system), linearly independent vectors W; the start is corrected so that W^T r = 0.
        x0: the start; None is 0.
        tolerance: >= 0, of ||r|| relative to the start's.
        absolute_tolerance: >= 0, of ||r||; a system is solved when it is within either.
        max_iterations: >= 0.
        keep: directions that a new one is made A-orthogonal to, >= 0; the paper keeps 2.
        normalize: propose gets r / ||r||, which a network with biases needs; else r.
        recompute_every: r is computed as b - A x every so many steps, at one more product; 0 is never.
        batched: see `b`.
        callback: called as (k, x_k) after each step.

    Returns:
        The result. Not converging is told there, not raised.

    Raises:
        ValueError: shapes that do not fit, b not finite, numbers out of range, or d^T A d <= 0: A is not positive
            definite.

    Example:
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> result = conjugate_directions(lambda x: A @ x, torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> result.iterations, result.converged
        (2, True)
    """
    _check(b, x0, tolerance, absolute_tolerance, max_iterations, keep, recompute_every)
    space = _Space(b, batched)
    x = torch.zeros_like(b) if x0 is None else x0.to(b, copy=True)
    first = matvec(x if x0 is not None else b)
    if first.shape != b.shape or first.dtype != b.dtype:
        raise ValueError(
            f"`matvec` gives {first.dtype} {tuple(first.shape)} for `b` of {b.dtype} {tuple(b.shape)}; takes the same"
        )
    r = b - first if x0 is not None else b.clone()
    start = space.norm(r)
    if deflation is not None:
        deflator = _Deflation(matvec, deflation, space)
        x, r = deflator.corrected(x, r)
    else:
        deflator = None
    goal = torch.maximum(tolerance * start, torch.full_like(start, absolute_tolerance))
    scale = start.clamp_min(torch.finfo(start.dtype).tiny)
    norm = space.norm(r)
    residuals, restarts, k = [float((norm / scale).max())], 0, 0
    active = norm > goal
    past: list[tuple[Tensor, Tensor, Tensor]] = []
    while k < max_iterations and bool(active.any()):
        safe = norm.clamp_min(torch.finfo(norm.dtype).tiny)
        shown = space.scaled(r, 1 / safe) if normalize else r
        if propose is None:
            q = shown
        else:
            q = propose(shown)
            if q.shape != b.shape:
                raise ValueError(f"`propose` gives shape {tuple(q.shape)}; takes {tuple(b.shape)}")
            q = q.to(b.dtype)
        d = _orthogonalised(q, past, deflator, space)
        # A row whose proposal vanished, points nowhere or is not finite takes its residual instead.
        length, slope = space.norm(d), space.dot(d, r)
        useless = ~(length > 1e-7 * space.norm(q)) | ~(slope.abs() > 1e-12 * length * norm)
        useless = active & useless
        if bool(useless.any()):
            restarts += 1
            d = space.choose(useless, _orthogonalised(shown, past, deflator, space), d)
            lost = active & ~(space.dot(d, r).abs() > 1e-12 * space.norm(d) * norm)
            if bool(lost.any()):
                d = space.choose(lost, shown if deflator is None else deflator.project(shown), d)
        Ad = matvec(d)
        energy = space.dot(d, Ad)
        if bool((active & ~(energy > 0)).any()):
            raise ValueError("`matvec` is not positive definite along a search direction: d^T A d is not > 0")
        step = torch.where(active, space.dot(d, r) / torch.where(energy > 0, energy, 1), 0)
        x = x + space.scaled(d, step)
        k += 1
        again = recompute_every and k % recompute_every == 0
        r = b - matvec(x) if again else r - space.scaled(Ad, step)
        norm = space.norm(r)
        residuals.append(float((norm / scale).max()))
        active = active & (norm > goal)
        if keep:
            past = [*past, (d, Ad, torch.where(energy > 0, energy, 1))][-keep:]
        if callback is not None:
            callback(k, x)
    return LinearSolveResult(x, k, not bool(active.any()), residuals, restarts)


class _Space:
    """Inner products over one system, or over each of a batch."""

    def __init__(self, b: Tensor, batched: bool) -> None:
        self.batched = batched
        self._rows = b.shape[0] if batched else 1
        self._shape = (-1, *[1] * (b.ndim - 1)) if batched else (1,) * max(b.ndim, 1)
        # Half of float64's cost is saved where the device has no float64.
        self._wide = torch.float32 if b.device.type == "mps" else torch.float64

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.reshape(self._rows, -1).to(self._wide) * b.reshape(self._rows, -1).to(self._wide)).sum(1)

    def norm(self, a: Tensor) -> Tensor:
        return torch.linalg.vector_norm(a.reshape(self._rows, -1), dim=1, dtype=self._wide)

    def scaled(self, a: Tensor, factor: Tensor) -> Tensor:
        return a * factor.to(a.dtype).reshape(self._shape).reshape([-1] + [1] * (a.ndim - 1) if a.ndim else [])

    def choose(self, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(rows.reshape([-1] + [1] * (a.ndim - 1)), a, b)


class _Deflation:
    """Keeps directions A-orthogonal to fixed vectors W."""

    def __init__(self, matvec: Callable[[Tensor], Tensor], vectors: Tensor, space: _Space) -> None:
        if space.batched:
            raise ValueError("`deflation` takes one system: not `batched`")
        self._W = vectors.reshape(len(vectors), -1)
        self._AW = torch.stack([matvec(w).reshape(-1) for w in vectors])
        gram = self._W.double() @ self._AW.double().T
        self._factor, info = torch.linalg.cholesky_ex((gram + gram.T) / 2)
        if int(info):
            raise ValueError("`deflation` has vectors that depend on each other, or `matvec` is not positive definite")

    def project(self, q: Tensor) -> Tensor:
        """q - W (W^T A W)^{-1} (A W)^T q."""
        return q - self._combined(self._AW @ q.reshape(-1)).reshape(q.shape)

    def corrected(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """x + W (W^T A W)^{-1} W^T r and its residual."""
        coefficients = self._solved(self._W @ r.reshape(-1))
        return x + (coefficients @ self._W).reshape(x.shape), r - (coefficients @ self._AW).reshape(r.shape)

    def _combined(self, products: Tensor) -> Tensor:
        return self._solved(products) @ self._W

    def _solved(self, right: Tensor) -> Tensor:
        return torch.cholesky_solve(right.double()[:, None], self._factor)[:, 0].to(right.dtype)


def _orthogonalised(
    q: Tensor, past: list[tuple[Tensor, Tensor, Tensor]], deflator: _Deflation | None, space: _Space
) -> Tensor:
    d = q if deflator is None else deflator.project(q)
    for direction, product, energy in past:
        d = d - space.scaled(direction, space.dot(q, product) / energy)
    return d


def _check(b: Tensor, x0: Tensor | None, tolerance: float, absolute: float, steps: int, keep: int, every: int) -> None:
    if not isinstance(b, Tensor) or not b.is_floating_point() or not b.numel():
        raise ValueError(f"`b` is {type(b).__name__}; takes a floating tensor that is not empty")
    if not bool(torch.isfinite(b).all()):
        raise ValueError("`b` has entries that are not finite")
    if x0 is not None and x0.shape != b.shape:
        raise ValueError(f"`x0` has shape {tuple(x0.shape)}; takes that of `b`, {tuple(b.shape)}")
    if not (0 <= tolerance < math.inf and 0 <= absolute < math.inf):
        raise ValueError(f"`tolerance` is {tolerance}, `absolute_tolerance` {absolute}; takes numbers >= 0")
    if steps < 0 or keep < 0 or every < 0:
        raise ValueError(f"`max_iterations` is {steps}, `keep` {keep}, `recompute_every` {every}; takes integers >= 0")
