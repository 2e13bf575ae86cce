"""Equality constraints from values and first derivatives, a point at a time, for functions dear to evaluate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_number, checked_point

from .kkt import Point, least_squares

__all__ = ["FirstOrderSQP"]

_STATE = ("point", "lam", "tau", "eta1", "eta2", "direction", "size", "rejected", "reach")


class FirstOrderSQP:
    """min f(x) subject to c(x) = 0, asked for points and told f, its gradient, c and its Jacobian G there.

    `minimize_equality` with B = tau I in place of the Hessian, so that the Newton system has the solution

        lambda' = (G G^T)^-1 (tau s c - G grad f),        dx = -(grad f + G^T lambda') / tau

    with s = 1, or less where the constraints' linearization is not trusted so far (`reach`),
    and with tau by Barzilai's and Borwein's rule from the last step. A trial is taken if the exact augmented Lagrangian
    falls by Armijo's rule, with tau I for the Hessian in its slope too; otherwise the step is halved and asked for
    again. Penalties begin at tau / lambda_min(G G^T) and 0.1 / tau, so that units do not matter.

    Source: the merit and its test of descent are those of Hong, Na, Mahoney, Kolar (arXiv 2305.18379); B is ours.

    Args:
        x0: (n,), where to start, floating.
        step: > 0, length of the first step relative to x0's norm.
        beta: of Armijo's rule, in (0, 1/2).
        nu: > 1, growth of penalties.
        reach: > 0, longest part of the first steps that restores the constraints, relative to x0's norm: how far their
            linearization is trusted.

    Attributes:
        point: the last point that was taken, None before the first `tell`.
        lam: its multipliers (m,).
        size: length of the present step, 1 at first.
        reach: the same at present: it grows with steps that are taken whole and shrinks with what is refused thrice.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> a = torch.tensor([3.0, 4.0], dtype=torch.float64)
        >>> solver = FirstOrderSQP(torch.tensor([-1.0, 0.5], dtype=torch.float64))
        >>> for _ in range(60):
        ...     x = solver.ask()
        ...     taken = solver.tell(float(a @ x), a, (x @ x - 1).reshape(1), 2 * x[None])
        >>> [round(value, 4) for value in solver.point.x.tolist()]
        [-0.6, -0.8]
    """

    def __init__(
        self, x0: Tensor, *, step: float = 0.1, beta: float = 0.1, nu: float = 1.5, reach: float = math.inf
    ) -> None:
        self.start = checked_point("x0", x0).flatten().clone()
        self.step = checked_number("step", step, above=0)
        if not 0 < checked_number("beta", beta) < 0.5:
            raise ValueError(f"`beta` is {beta}; takes a number in (0, 1/2)")
        self.beta, self.nu = beta, checked_number("nu", nu, above=1)
        self.point: Point | None = None
        self.lam: Tensor | None = None
        self.tau, self.eta1, self.eta2 = 0.0, 0.0, 0.0
        self.direction: tuple[Tensor, Tensor, float] | None = None
        self.size, self.rejected = 1.0, 0
        if not reach > 0:
            raise ValueError(f"`reach` is {reach}; takes a number above 0")
        self.reach = reach * max(float(torch.linalg.vector_norm(self.start)), 1e-12)

    def ask(self) -> Tensor:
        """Where derivatives are wanted next, (n,)."""
        if self.point is None:
            return self.start.clone()
        return self.point.x + self.size * self.direction[0]

    def restoration(self) -> Tensor:
        """The point taken, moved towards where the linearized constraints hold, at most by `reach`, (n,)."""
        if self.point is None:
            return self.start.clone()
        move = self.point.restoration()
        return self.point.x + self._trusted(move) * move

    def tell(self, value: float, gradient: Tensor, c: Tensor, jacobian: Tensor, x: Tensor | None = None) -> bool:
        """Takes what is at a point.

        Args:
            value: f.
            gradient: of f, n elements.
            c: (m,).
            jacobian: G, (m, n) elements.
            x: the point, None is the one last asked for; another, such as a restoration, is taken if what is left to
                restore is less, in the metric of the point taken before (the natural monotonicity test of Newton's
                method), whatever its merit.

        Returns:
            Whether the point was taken.
        """
        forced = x is not None
        x = self.ask() if x is None else x.flatten().to(self.start)
        found = Point(x, float(value), gradient.flatten().to(x), c.to(x), jacobian.reshape(len(c), x.numel()).to(x))
        if self.point is None or forced:
            taken = found.finite and (self.point is None or self._restores(found))
            if taken:
                self._take(found, None)
            return taken
        _, dlam, slope = self.direction
        lam, penalties = self.lam + self.size * dlam, [self.eta1, self.eta2]
        limit = self.point.merit(self.lam, penalties) + self.beta * self.size * slope
        if not found.finite or found.merit(lam, penalties) > limit:
            self.size, self.rejected = self.size / 2, self.rejected + 1
            if self.rejected % 3 == 0:  # the curvature is underestimated, or the constraints are bent
                self.tau *= 4
                if self._restoring > float(torch.linalg.vector_norm(self.direction[0])) / 2:
                    self.reach = self._restoring / 4
                self._aim()
            return False
        if self.size == 1:
            self.reach = max(self.reach, 2 * self._restoring)
        self._take(found, lam)
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a solver of the same start goes on from; its tensors are shared, never changed in place."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`.

        Raises:
            ValueError: for something else.
        """
        if set(state) != set(_STATE):
            raise ValueError(f"`state` has {sorted(state)}; takes {sorted(_STATE)}")
        for name in _STATE:
            setattr(self, name, state[name])

    def _trusted(self, move: Tensor) -> float:
        """The part of a restoration that is within reach."""
        return min(1.0, self.reach / max(float(torch.linalg.vector_norm(move)), 1e-300))

    @property
    def _restoring(self) -> float:
        """Length of the part of the direction that restores."""
        return min(self.reach, float(torch.linalg.vector_norm(self.point.restoration())))

    def _restores(self, found: Point) -> bool:
        """Whether a point has less to restore than the one taken; sets how far the next restoration reaches."""
        left = torch.linalg.vector_norm(replace(self.point, c=found.c).restoration())
        less = bool(left < torch.linalg.vector_norm(self.point.restoration()))
        length = float(torch.linalg.vector_norm(found.x - self.point.x))
        self.reach = max(self.reach, 2 * length) if less else length / 4
        return less

    def _take(self, found: Point, lam: Tensor | None) -> None:
        before, self.point = self.point, found
        self.lam = found.multipliers() if lam is None else lam
        gram = found.jacobian @ found.jacobian.T
        if before is None:
            tangent = torch.linalg.vector_norm(found.slope(found.multipliers()))
            length = self.step * torch.linalg.vector_norm(found.x)
            self.tau = max(float(tangent / length.clamp_min(1e-12)), 1e-12)
            least = float(torch.linalg.eigvalsh(gram)[0]) if len(gram) else 1.0
            self.eta1, self.eta2 = self.tau / max(least, 1e-12), 0.1 / self.tau
        else:
            moved, turned = found.x - before.x, found.slope(self.lam) - before.slope(self.lam)
            curvature = float((moved @ turned).abs() / (moved @ moved).clamp_min(1e-30))
            self.tau = min(max(curvature, self.tau / 4), 4 * self.tau)
        self._aim()

    def _aim(self) -> None:
        """The direction from the point taken, with penalties at which it descends."""
        point, lam, tau = self.point, self.lam, self.tau
        G, c, slope = point.jacobian, point.c, point.slope(self.lam)
        restoration = point.restoration()
        part = self._trusted(restoration)
        new = least_squares(G @ G.T, part * tau * c - G @ point.gradient)
        dx, dlam = -point.slope(new) / tau, new - lam
        # The paper's ||b||^2, with the violation as the length of its restoration so that its unit does not matter.
        square = float(slope.square().sum() + (part * tau) ** 2 * restoration.square().sum())
        along, across = float(slope @ dx), float(c @ dlam)
        pushed, violated = float((G @ slope) @ dlam), part * float(c.square().sum())
        for _ in range(100):
            descent = along * (1 + self.eta2 * tau) - self.eta1 * violated + across + self.eta2 * pushed
            if descent <= -self.eta2 / 2 * square:
                break
            self.eta1, self.eta2 = self.eta1 * self.nu**2, self.eta2 / self.nu
        self.direction, self.size, self.rejected = (dx, dlam, descent), 1.0, 0
