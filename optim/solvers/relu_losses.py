"""Losses of a single output and their proximal operators, plain or at the worst point of a box around each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["LOSSES", "Loss", "project_robust_cone"]

HALVINGS = 45
"""Of a bisection: to 3e-14 of its interval."""


NEWTON_STEPS = 60


@dataclass(frozen=True)
class Loss:
    """A loss sum_k psi(m_k) of outputs a_k.

    m_k = 1 - y_k a_k ("hinge"), -y_k a_k ("logistic") or |a_k - y_k| ("squared"), plus epsilon ||T_k||_1 at the worst
    point of a box around the row where T_k is the output's gradient there (arXiv:2201.01965, adversarial training).

    Attributes:
        name: of the loss.
        labels: y is -1 or +1, and m is linear in the output.
        value: psi(m), elementwise.
        slope: psi'(m), elementwise; at a kink the right one.
        conjugate: (theta, y) to the conjugate of a -> psi(m(a)) at theta, elementwise.
    """

    name: str
    labels: bool
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    conjugate: Callable[[Tensor, Tensor], Tensor]

    def margin(self, a: Tensor, y: Tensor, spread: Tensor | None = None) -> Tensor:
        """m of outputs (m,); `spread` is epsilon ||T||_1, (m,)."""
        base = (a - y).abs() if not self.labels else (1 - y * a if self.name == "hinge" else -y * a)
        return base if spread is None else base + spread

    def gradient(self, a: Tensor, y: Tensor) -> Tensor:
        """Of the plain loss in the outputs, elementwise."""
        return a - y if not self.labels else -y * self.slope(self.margin(a, y))

    def prox(self, a0: Tensor, y: Tensor, rho: float) -> Tensor:
        """argmin_a psi(m(a)) + rho/2 (a - a0)^2, elementwise."""
        if self.name == "squared":
            return (y + rho * a0) / (1 + rho)
        m0 = self.margin(a0, y)
        if self.name == "hinge":
            return a0 + y * (rho * m0).clamp(0, 1) / rho
        theta = _bisect(lambda t: self.slope(m0 - t / rho) - t, torch.ones_like(m0))
        return a0 + y * theta / rho

    def robust_prox(self, a0: Tensor, T0: Tensor, y: Tensor, rho: float, epsilon: float) -> tuple[Tensor, Tensor]:
        """argmin over (a, T) of psi(m(a) + epsilon ||T||_1) + rho/2 ((a - a0)^2 + ||T - T0||^2).

        The multiplier theta = psi'(m) of each row is found by bisection: a and T are then shifted and soft thresholds.

        Args:
            a0: (m,).
            T0: (m, ...).
            y: (m,).
            rho: > 0.
            epsilon: > 0.
        """
        signed = (a0 - y) if not self.labels else None

        def point(theta: Tensor) -> tuple[Tensor, Tensor]:
            T = _soft(T0, (epsilon * theta / rho).reshape(-1, *[1] * (T0.ndim - 1)))
            a = a0 + y * theta / rho if signed is None else y + _soft(signed, theta / rho)
            return a, T

        def excess(theta: Tensor) -> Tensor:
            a, T = point(theta)
            return self.slope(self.margin(a, y, epsilon * T.flatten(1).abs().sum(1))) - theta

        high = torch.ones_like(a0)
        if signed is not None:
            high = signed.abs() + epsilon * T0.flatten(1).abs().sum(1)
        return point(_bisect(excess, high))


def _xlogx(p: Tensor) -> Tensor:
    return torch.special.xlogy(p, p)


LOSSES: dict[str, Loss] = {
    "squared": Loss("squared", False, lambda m: m.square() / 2, lambda m: m, lambda t, y: t.square() / 2 + t * y),
    "hinge": Loss("hinge", True, lambda m: m.clamp_min(0), lambda m: (m >= 0).to(m), lambda t, y: t * y),
    "logistic": Loss(
        "logistic", True, softplus, torch.sigmoid, lambda t, y: _xlogx(-t * y) + _xlogx((1 + t * y).clamp_min(0))
    ),
}


def _soft(x: Tensor, by: Tensor) -> Tensor:
    return x.sign() * (x.abs() - by).clamp_min(0)


def _bisect(excess: Callable[[Tensor], Tensor], high: Tensor) -> Tensor:
    """The zero in [0, high], elementwise, of a function that falls."""
    low = torch.zeros_like(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = excess(middle) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def project_robust_cone(s0: Tensor, p0: Tensor, epsilon: float, perturbed: int) -> tuple[Tensor, Tensor]:
    """The nearest (s, p) with min_k s_k >= epsilon ||p||_1, the norm over p's first `perturbed` entries.

    s = max(s0, t) and p soft-thresholded by epsilon eta, where t = epsilon ||p||_1 and eta = sum_k (t - s0_k)_+ meet:
    one falls and the other rises in eta. It keeps the signs of a neuron's inputs fixed over
    the box of each row (arXiv:2201.01965).

    Args:
        s0: (..., n).
        p0: (..., d).
        epsilon: > 0.
        perturbed: entries of p whose inputs are perturbed; a bias's is not.
    """
    free, fixed = p0[..., :perturbed], p0[..., perturbed:]

    def level(eta: Tensor) -> Tensor:
        return epsilon * _soft(free, (epsilon * eta)[..., None]).abs().sum(-1)

    def pushed(t: Tensor) -> Tensor:
        return (t[..., None] - s0).clamp_min(0).sum(-1)

    # The excess is convex and piecewise linear in eta, so Newton's method from 0 rises to its zero in a few steps.
    eta = torch.zeros_like(s0[..., 0])
    for _ in range(NEWTON_STEPS):
        t = level(eta)
        excess = pushed(t) - eta
        if not bool((excess > 1e-14 * (1 + eta)).any()):
            break
        below, kept = (s0 < t[..., None]).sum(-1), (free.abs() > (epsilon * eta)[..., None]).sum(-1)
        eta = eta + excess.clamp_min(0) / (1 + epsilon**2 * below * kept)
    p = torch.cat([_soft(free, (epsilon * eta)[..., None]), fixed], -1)
    return torch.maximum(s0, level(eta)[..., None]), p
