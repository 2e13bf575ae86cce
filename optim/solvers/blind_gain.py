"""A signal and the unknown gains of its sensors from a few linear measurements, by projected gradient descent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.optim.checks import checked_count, checked_number

__all__ = ["CalibrationResult", "calibrate_gains", "gain_step", "project_gains"]

HALVINGS = 100


@dataclass(frozen=True)
class CalibrationResult:
    """What was found.

    Attributes:
        signal: of the signal's shape; where the true gains do not average 1, times their mean.
        gains: (m,), averaging 1 over the sensors that saw anything.
        loss: 1/(2mp) sum of squared residuals, where y is scaled to a mean square of 1.
        num_iterations: steps taken.
        converged: the loss reached the tolerance.
        dead: (m,) bool, sensors whose measurements are all 0 (by their gain or row); left out, their gain kept at 1.
        history: losses, the start's first.
    """

    signal: Tensor
    gains: Tensor
    loss: float
    num_iterations: int
    converged: bool
    dead: Tensor
    history: list[float] = field(repr=False)


def project_gains(gains: Tensor, rho: float) -> Tensor:
    """The nearest point of {1 + v : sum v = 0, |v_i| <= rho}, by bisection on the shift t of v = clip(w - t).

    Args:
        gains: (m,) floating.
        rho: in (0, 1].

    Raises:
        ValueError: `rho` out of its range.

    Example:
        >>> project_gains(torch.tensor([3.0, 1.0, 1.0]), 0.5).tolist()
        [1.5, 0.75, 0.75]
    """
    if not 0 < rho <= 1:
        raise ValueError(f"`rho` is {rho}; takes a number in (0, 1]")
    w = gains - 1
    inner = w - w.mean()
    if bool((inner.abs() <= rho).all()):  # the box does not bind, as in nearly every step of the calibration
        return 1 + inner
    low, high = w.min() - rho, w.max() + rho
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = (w - middle).clamp(-rho, rho).sum() > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return 1 + (w - (low + high) / 2).clamp(-rho, rho)


def gain_step(y: Tensor, ax: Tensor, *, rho: float = 0.99) -> Tensor:
    """The best gains for a fixed signal: gamma_i = sum_l (Ax)_li y_li / sum_l (Ax)_li^2, scaled to mean 1, projected.

    Inside a sampler it takes the calibration from the clean estimate at each step; a sensor that the estimate does not
    reach keeps gain 1.

    Args:
        y: (p, m), measurements.
        ax: (p, m), what they would be with all gains 1.
        rho: in (0, 1].

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_measurements(y)
    if ax.shape != y.shape:
        raise ValueError(f"`ax` has shape {tuple(ax.shape)}; takes that of `y`, {tuple(y.shape)}")
    energy = ax.square().sum(0)
    seen = energy > 0
    gains = torch.where(seen, (ax * y).sum(0) / torch.where(seen, energy, 1), 1)
    mean = gains[seen].mean() if bool(seen.any()) else gains.new_ones(())
    return project_gains(torch.where(seen, gains / torch.where(mean > 0, mean, 1), 1), rho)


@torch.no_grad()
def calibrate_gains(
    y: Tensor,
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    *,
    rho: float = 0.99,
    max_iterations: int = 1000,
    tolerance: float = 1e-12,
    signal_basis: Tensor | None = None,
    gain_basis: Tensor | None = None,
    step: float | None = None,
    initial: Tensor | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> CalibrationResult:
    """Solves y_l = diag(g) A_l x, l = 1..p, for the signal x and the gains g > 0 of mean 1.

        f(xi, gamma) = 1/(2mp) sum_l ||diag(gamma) A_l xi - y_l||^2

    from the back-projection xi_0 = 1/(mp) sum_l A_l^T y_l and gamma_0 = 1 by gradient descent in both, the gains'
    gradient without its mean and their step projected on |gamma_i - 1| <= rho, each with its exact line search.
    Source: "Through the Haze: a Non-Convex Approach to Blind Gain Calibration for Linear Random Sensing Models"
    (arXiv:1610.09028), Algorithm 1, and its form with subspace priors x = Z zeta, g = B beta, whose gradients are
    projected on the spans. It converges to the exact pair where mp is a small multiple of the number of unknowns and
    the rows of A are random; with one fixed mask or blur it may stall, which `loss` shows.

    Every gain must multiply measurements of a shared signal: a gain of its own for each colour channel of a photograph
    is absorbed by that channel, and nothing here can tell.

    Args:
        y: (p, m) floating: p snapshots of m sensors.
        forward: signal to (p, m), all gains 1; A normalized so that E A_l^T A_l = m I.
        adjoint: (p, m) to a signal.
        rho: in (0, 1], how far gains may be from 1.
        max_iterations: >= 1.
        tolerance: >= 0, of the loss with y scaled to a mean square of 1.
        signal_basis: (signal's shape..., k), a subspace with the signal in it.
        gain_basis: (m, h), one with the gains in it, the vector of ones among them.
        step: fixed step mu of the signal, the gains' being mu m / ||xi_0||^2, as in the paper's theorem; None is the
            line search.
        initial: a signal to start from in place of the back-projection.
        callback: called as (k, xi, gamma) after each step.

    Returns:
        The result. Not converging is told there.

    Raises:
        ValueError: shapes that do not fit, an adjoint that is none, all measurements 0, values that are not finite, or
            fewer measurements than unknowns with no prior on either.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> A = torch.randn(8, 16, 16, generator=generator, dtype=torch.float64)
        >>> x = torch.randn(16, generator=generator, dtype=torch.float64)
        >>> g = project_gains(1 + 0.4 * torch.randn(16, generator=generator, dtype=torch.float64), 0.5)
        >>> found = calibrate_gains(g * (A @ x), lambda v: A @ v, lambda r: torch.einsum("lij,li->j", A, r))
        >>> bool((found.gains - g).norm() < 1e-4 * g.norm())
        True
    """
    _check_measurements(y)
    project_gains(torch.ones(2), rho)
    checked_count("max_iterations", max_iterations)
    checked_number("tolerance", tolerance, least=0)
    if step is not None:
        checked_number("step", step, above=0)
    p, m = y.shape
    dead = ~(y != 0).any(0)
    if bool(dead.all()):
        raise ValueError("`y` is 0 everywhere: there is no signal")
    size = y.square().mean().sqrt()
    b = y / size
    xi = adjoint(b) / (m * p)
    _check_operators(forward, adjoint, xi, b)
    project_x, unknowns = _projector(signal_basis, xi, "signal_basis")
    project_g, gain_unknowns = _projector(gain_basis, b[0], "gain_basis")
    if m * p < unknowns + gain_unknowns:
        raise ValueError(
            f"`y` has {m * p} measurements of {unknowns + gain_unknowns} unknowns; takes as many at least, or "
            "`signal_basis` and `gain_basis` that say more"
        )
    xi = project_x(xi if initial is None else initial.to(xi) / size)
    gains, live = torch.ones_like(b[0]), ~dead

    def seen(v: Tensor) -> Tensor:
        return forward(v).where(live, 0)  # a gain of 0 says nothing of the signal

    fixed = None if step is None else (step, step * m / xi.square().sum())
    history: list[float] = []
    ax, k = seen(xi), 0
    while True:
        r = gains * ax - b
        history.append(float(r.square().sum()) / (2 * m * p))
        if history[-1] <= tolerance or k == max_iterations:
            break
        k += 1
        grad_x = project_x(adjoint(gains * r) / (m * p))
        grad_g = project_g(torch.where(dead, 0, (ax * r).sum(0) / (m * p)))
        grad_g = torch.where(dead, 0, grad_g - grad_g[live].mean())
        a_grad = seen(grad_x)
        mu_x, mu_g = fixed or (_line_search(gains * a_grad, r), _line_search(grad_g * ax, r))
        xi, ax = xi - mu_x * grad_x, ax - mu_x * a_grad
        if k % 50 == 0:
            ax = seen(xi)  # what rounding has added up
        gains = gains - mu_g * grad_g
        gains = torch.where(dead, 1, gains).masked_scatter(live, project_gains(gains[live], rho))
        if callback is not None:
            callback(k, xi * size, gains)
    edge = ((gains - 1).abs() >= rho * (1 - 1e-9)).double().mean()
    if float(edge) > 0.05 and rho < 1:
        warnings.warn(f"{float(edge):.0%} of the gains are {rho:g} away from 1, the most allowed", stacklevel=2)
    return CalibrationResult(xi * size, gains, history[-1], k, history[-1] <= tolerance, dead, history)


def _line_search(change: Tensor, r: Tensor) -> Tensor:
    """The step along -change that leaves least of r; 0 where there is no change."""
    energy = change.square().sum()
    return torch.where(energy > 0, (change * r).sum() / torch.where(energy > 0, energy, 1), 0)


def _projector(basis: Tensor | None, like: Tensor, name: str) -> tuple[Callable[[Tensor], Tensor], int]:
    """The orthogonal projection on a basis' span, and its dimension."""
    if basis is None:
        return (lambda v: v), like.numel()
    if basis.shape[:-1] != like.shape or not 1 <= basis.shape[-1] <= like.numel():
        raise ValueError(f"`{name}` has shape {tuple(basis.shape)}; takes {tuple(like.shape)} and a dimension more")
    Q, R = torch.linalg.qr(basis.reshape(like.numel(), -1).to(like))
    sizes = R.diagonal().abs()
    if float(sizes.min()) < 1e-6 * float(sizes.max()):
        raise ValueError(f"`{name}` has columns that depend on each other")
    if name == "gain_basis":
        ones = Q.new_ones(len(Q))
        if float((Q @ (Q.T @ ones) - ones).abs().max()) > 1e-4:
            raise ValueError("`gain_basis` has no combination that is 1 everywhere: equal gains would be excluded")
    return (lambda v: (Q @ (Q.T @ v.reshape(-1))).reshape(v.shape)), basis.shape[-1]


def _check_measurements(y: Tensor) -> None:
    if not isinstance(y, Tensor) or y.ndim != 2 or not y.is_floating_point() or not y.numel():
        got = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"`y` is {got}; takes floating (p, m), snapshots by sensors")
    if not bool(torch.isfinite(y).all()):
        raise ValueError("`y` has values that are not finite")


def _check_operators(forward: Callable, adjoint: Callable, x: Tensor, y: Tensor) -> None:
    """<A x, r> = <x, A^T r> on the measurements themselves and a scrambled signal."""
    probe = x + x.std() * torch.cos(torch.arange(x.numel(), dtype=x.dtype, device=x.device)).reshape(x.shape)
    ax = forward(probe)
    if ax.shape != y.shape:
        raise ValueError(f"`forward` gives shape {tuple(ax.shape)}; takes that of `y`, {tuple(y.shape)}")
    left, right = float((ax * y).sum()), float((probe * adjoint(y)).sum())
    if not abs(left - right) <= 1e-3 * float(ax.norm() * y.norm()):
        raise ValueError(f"`adjoint` is not that of `forward`: <A x, r> is {left:g} and <x, A^T r> {right:g}")
