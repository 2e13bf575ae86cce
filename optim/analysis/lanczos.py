"""Lanczos's method with reorthogonalization: a small tridiagonal matrix that stands for a large one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_count, checked_generator, checked_number

from .operators import SymmetricOperator

__all__ = ["EigenResult", "LanczosResult", "lanczos", "top_eigenpairs"]

_WHICH = ("LA", "SA", "LM", "BE")


@dataclass(frozen=True)
class LanczosResult:
    """What m steps gave; float64 on the CPU.

    Attributes:
        alpha: (m,), the tridiagonal matrix's diagonal.
        beta: (m,), beside it; the last one is what is left over.
        ritz_values: (m,), its eigenvalues, ascending.
        weights: (m,), squares of its eigenvectors' first components: a quadrature, which sums to 1.
        residuals: (m,), ||A y - theta y|| of each Ritz pair, so that an eigenvalue is at most so far away.
        vectors: (n, m), an orthonormal basis; None without reorthogonalization.
        coefficients: (m, m), a column for each Ritz value: ``vectors @ coefficients`` are the Ritz vectors.
        breakdown: whether the basis spans an invariant space, where all is exact.
    """

    alpha: Tensor
    beta: Tensor
    ritz_values: Tensor
    weights: Tensor
    residuals: Tensor
    vectors: Tensor | None
    coefficients: Tensor
    breakdown: bool


@dataclass(frozen=True)
class EigenResult:
    """Eigenvalues at an end of a spectrum; float64 on the CPU.

    Attributes:
        values: (k,), the sought end first: descending for "LA", ascending for "SA", by size for "LM"; for "BE"
            descending from the largest to the smallest.
        vectors: (n, k), or None.
        residuals: (k,), ||A v - value v||.
        converged: (k,) bool.
        num_products: with the matrix.
    """

    values: Tensor
    vectors: Tensor | None
    residuals: Tensor
    converged: Tensor
    num_products: int


class _Process:
    """The basis as it grows; without ``keep`` only its last two vectors are there."""

    def __init__(self, op: SymmetricOperator, start: Tensor, steps: int, keep: bool) -> None:
        self.op, self.keep = op, keep
        self.basis = torch.zeros(steps if keep else 2, op.size, dtype=torch.float64)
        self.basis[0] = start / torch.linalg.vector_norm(start)
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.breakdown = False

    def step(self) -> None:
        j = len(self.alpha)
        here = j if self.keep else j % 2
        v = self.basis[here]
        w = self.op(v)
        if j and not self.keep:
            w = w - self.beta[-1] * self.basis[1 - here]
        self.alpha.append(float(w @ v))
        if self.keep:
            known = self.basis[: j + 1]
            for _ in range(2):  # once is not enough
                w = w - known.T @ (known @ w)
        else:
            w = w - self.alpha[-1] * v
        norm = float(torch.linalg.vector_norm(w))
        scale = max(map(abs, self.alpha + self.beta))
        self.breakdown = norm <= 1e-12 * scale or j + 1 == self.op.size
        self.beta.append(0.0 if self.breakdown else norm)
        if not self.breakdown and (not self.keep or j + 1 < len(self.basis)):
            self.basis[j + 1 if self.keep else 1 - here] = w / norm

    def restart(self, generator: torch.Generator) -> bool:
        """Goes on with a direction outside of an invariant space; whether there is one."""
        j = len(self.alpha)
        if j == self.op.size or j == len(self.basis):
            return False
        w, known = _gaussian(self.op.size, generator), self.basis[:j]
        for _ in range(3):
            w = w - known.T @ (known @ w)
        self.basis[j] = w / torch.linalg.vector_norm(w)
        return True

    def result(self) -> LanczosResult:
        m = len(self.alpha)
        alpha, beta = (torch.tensor(values, dtype=torch.float64) for values in (self.alpha, self.beta))
        tridiagonal = torch.diag(alpha) + torch.diag(beta[:-1], 1) + torch.diag(beta[:-1], -1)
        theta, u = torch.linalg.eigh(tridiagonal)
        vectors = self.basis[:m].T.clone() if self.keep else None
        return LanczosResult(alpha, beta, theta, u[0].square(), (beta[-1] * u[-1]).abs(), vectors, u, self.breakdown)


def lanczos(
    op: SymmetricOperator,
    num_steps: int = 100,
    *,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    reorthogonalize: bool = True,
    callback: Callable[[int, int], Any] | None = None,
) -> LanczosResult:
    """Lanczos's method in float64, every vector made orthogonal to all earlier ones twice.

    Source: Golub and Van Loan, "Matrix Computations", section 10.1; for quadrature Ghorbani, Krishnan, Xiao, "An
    Investigation into Neural Net Optimization via Hessian Eigenvalue Density" (arXiv 1901.10159).

    Args:
        op: the matrix.
        num_steps: products; n at most are taken, and fewer where the space is invariant.
        start: (n,), not 0; None is Rademacher's signs.
        generator: of the start; None is seed 0.
        reorthogonalize: keep the basis, 8 n num_steps bytes. Without it eigenvalues come several times, which a
            quadrature's weights make up for.
        callback: called as (steps taken, num_steps) after each; True ends it there, which is a result too.

    Raises:
        ValueError: `num_steps` < 1, or a start of another shape, or 0.

    Example:
        >>> result = lanczos(SymmetricOperator.from_matrix(torch.diag(torch.tensor([1.0, 2.0, 5.0]))))
        >>> [round(value, 6) for value in result.ritz_values.tolist()]
        [1.0, 2.0, 5.0]
    """
    steps = min(checked_count("num_steps", num_steps), op.size)
    process = _Process(op, _start(op.size, start, generator), steps, reorthogonalize)
    for step in range(steps):
        process.step()
        if (callback is not None and callback(step + 1, steps)) or process.breakdown:
            break
    return process.result()


def top_eigenpairs(
    op: SymmetricOperator,
    k: int = 10,
    *,
    which: Literal["LA", "SA", "LM", "BE"] = "LA",
    max_iter: int = 300,
    tol: float = 1e-6,
    eigenvectors: bool = False,
    generator: torch.Generator | None = None,
    callback: Callable[[int, int], Any] | None = None,
) -> EigenResult:
    """Eigenvalues at an end of the spectrum, by one run of Lanczos's method.

    It ends once every wanted Ritz value is within `tol` of an eigenvalue, relative to the largest one: by its residual
    r, or r^2 over the gap to its neighbours where only values are wanted. As with every method from one starting
    vector, an eigenvalue that occurs several times may be found once.

    Args:
        op: the matrix.
        k: how many, <= n.
        which: "LA" the largest, "SA" the smallest, "LM" the largest in absolute value, "BE" half from each end, one
            more of the largest for an odd k.
        max_iter: products at most.
        tol: > 0.
        eigenvectors: return them.
        generator: of the Gaussian start; None is seed 0.
        callback: called as (products taken, max_iter) after each; True ends it there.

    Raises:
        ValueError: a value out of range; `max_iter` below k.

    Example:
        >>> top_eigenpairs(SymmetricOperator.from_matrix(torch.diag(torch.arange(9.0))), 2).values.round().tolist()
        [8.0, 7.0]
    """
    checked_choice("which", which, _WHICH)
    checked_count("k", k)
    checked_number("tol", tol, above=0)
    if k > op.size or max_iter < k:
        raise ValueError(f"`k` is {k}; takes at most the matrix's size, {op.size}, and `max_iter`, {max_iter}")
    random = checked_generator(generator)
    steps, first = min(max_iter, op.size), op.num_products
    process = _Process(op, _gaussian(op.size, random), steps, True)
    while True:
        process.step()
        done = len(process.alpha)
        stop = callback is not None and bool(callback(done, steps))
        if done >= k or stop:
            result = process.result()
            chosen = _chosen(result.ritz_values, min(k, done), which)
            bounds = result.residuals if eigenvectors else _bounds(result)
            converged = bounds[chosen] <= tol * float(result.ritz_values.abs().max())
            exact = process.breakdown and done == op.size
            if stop or exact or done == steps or (bool(converged.all()) and not process.breakdown):
                break
        if process.breakdown and not process.restart(random):
            break
    vectors = result.vectors @ result.coefficients[:, chosen] if eigenvectors else None
    used = op.num_products - first
    return EigenResult(result.ritz_values[chosen], vectors, result.residuals[chosen], converged, used)


def _start(size: int, start: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if start is None:
        random = checked_generator(generator)
        signs = torch.randint(0, 2, (size,), generator=random, device=random.device)
        return signs.to("cpu", torch.float64) * 2 - 1
    if start.shape != (size,) or not bool(torch.isfinite(start).all()) or not bool(start.any()):
        raise ValueError(f"`start` has shape {tuple(start.shape)}; takes ({size},), finite and not 0")
    return start.detach().to("cpu", torch.float64)


def _gaussian(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, device=generator.device, dtype=torch.float64).cpu()


def _chosen(values: Tensor, k: int, which: str) -> Tensor:
    """Places of the wanted ones among ascending values."""
    places = torch.arange(len(values))
    if which == "LA":
        return places.flip(0)[:k]
    if which == "SA":
        return places[:k]
    if which == "LM":
        return values.abs().argsort(descending=True)[:k]
    low = k // 2
    return torch.cat([places.flip(0)[: k - low], places[:low].flip(0)])


def _bounds(result: LanczosResult) -> Tensor:
    """Error bounds of Ritz values: the residual, or its square over the gap to all others where that is certain."""
    theta, r = result.ritz_values, result.residuals
    gaps = (theta[:, None] - theta[None, :]).abs() - r[None, :]
    gap = gaps.fill_diagonal_(torch.inf).min(1).values
    return torch.where((gap > r) & gap.isfinite(), r.square() / gap, r)
