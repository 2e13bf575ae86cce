"""A point of a constrained problem, and the Newton system there."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .merit import EqualityProblem
from .minres import minres
from .sketching import sketch_project

__all__ = ["KKTSystem", "Point", "least_squares"]


@dataclass(frozen=True)
class Point:
    """x (n,) with f, its gradient, c (m,) and its Jacobian G (m, n)."""

    x: Tensor
    value: float
    gradient: Tensor
    c: Tensor
    jacobian: Tensor

    @classmethod
    def at(cls, problem: EqualityProblem, x: Tensor) -> Point:
        """Evaluates a problem."""
        value, gradient, c, jacobian = problem.first(x)
        return cls(x, value, gradient.detach(), c.detach().to(x), jacobian.detach())

    @property
    def finite(self) -> bool:
        parts = [self.gradient.sum(), self.c.sum(), self.jacobian.sum()]
        return self.value - self.value == 0 and bool(torch.isfinite(torch.stack(parts)).all())

    @property
    def violation(self) -> float:
        return float(self.c.abs().max()) if len(self.c) else 0.0

    def slope(self, lam: Tensor) -> Tensor:
        """The Lagrangian's gradient in x."""
        return self.gradient + self.jacobian.T @ lam

    def residual(self, lam: Tensor) -> float:
        """||(grad_x L, c)||."""
        return float(torch.linalg.vector_norm(torch.cat([self.slope(lam), self.c])))

    def merit(self, lam: Tensor, penalties: list[float]) -> float:
        """The exact augmented Lagrangian."""
        eta1, eta2 = penalties
        squares = eta1 * self.c.square().sum() + eta2 * self.slope(lam).square().sum()
        return self.value + float(lam @ self.c + squares / 2)

    def multipliers(self) -> Tensor:
        """Those that make the Lagrangian's gradient shortest."""
        return -least_squares(self.jacobian @ self.jacobian.T, self.jacobian @ self.gradient)

    def restoration(self) -> Tensor:
        """The shortest step at which the linearized constraints hold."""
        return -self.jacobian.T @ least_squares(self.jacobian @ self.jacobian.T, self.c)


def least_squares(matrix: Tensor, right: Tensor) -> Tensor:
    """A^+ right for a symmetric A, singular ones too, computed in float64 on any device."""
    return (torch.linalg.pinv(matrix.double(), hermitian=True) @ right.double()).to(right)


class KKTSystem:
    """The Newton system of a point, solved as far as descent needs.

    Args:
        problem: whose curvature it has.
        solver: "auto", "dense", "sketch", "kaczmarz" or "minres".
        block: columns of a sketch.
        xi_b: least curvature on the constraints' tangents.
        max_inner: sketches or products a step.
        generator: of sketches.

    Attributes:
        shift: t of B = H + t I.
        inner: sketches or products of the last direction.
    """

    def __init__(
        self,
        problem: EqualityProblem,
        solver: str,
        block: int,
        xi_b: float,
        max_inner: int,
        generator: torch.Generator,
    ) -> None:
        self.problem, self.solver, self.block, self.xi_b = problem, solver, block, xi_b
        self.max_inner, self.generator = max_inner, generator
        self.shift, self.inner = 0.0, 0
        self._warned = False

    def at(self, point: Point, lam: Tensor) -> None:
        """Moves to a point; raises ValueError where a matrix would be too large."""
        unknowns = len(point.x) + len(lam)
        self.point, self.lam = point, lam
        self.matrices = self.solver != "minres" and (self.solver != "auto" or unknowns <= 500)
        if self.matrices and unknowns > 3000:
            raise ValueError(f"`solver` is {self.solver!r} with {unknowns} unknowns and constraints; takes at most "
                             "3000, and 'minres' beyond")  # fmt: skip
        if self.matrices:
            self.hessian = self.problem.hessian(point.x, lam).detach()
            self.shift = self._least_shift()
        else:
            self.product = self.problem.curvature(point.x, lam)

    def accepted(self, size: float) -> None:
        """Learns from a step's length: without eigenvalues, short steps call for a larger shift, full ones for less."""
        if not self.matrices and size < 0.5:
            self.shift = max(4 * self.shift, self.xi_b)
        elif not self.matrices and size == 1:
            self.shift = self.shift / 2 if self.shift > self.xi_b else 0.0

    def direction(
        self, penalties: list[float], accuracy: float, nu: float, *, adaptive: bool
    ) -> tuple[tuple[Tensor, Tensor, float], float]:
        """dx, dlambda and the merit's slope along them, with the accuracy it took; raises penalties where needed."""
        slope, c = self.point.slope(self.lam), self.point.c
        b = -torch.cat([slope, c])
        square = float(b.square().sum())
        bent, moved = self._curved(slope), self.point.jacobian.T @ c
        pushed = self.point.jacobian @ slope
        z, self.inner = None, 0
        for _ in range(200):
            z = self._solved(b, accuracy, z)
            eta1, eta2 = penalties
            gradient = torch.cat([slope + eta2 * bent + eta1 * moved, c + eta2 * pushed])
            descent = float(gradient @ z)
            bends_down = not self.matrices and self._bends_down(z)
            if descent <= -eta2 / 2 * square and not bends_down:
                break
            if eta1 > 1e8 or eta2 < 1e-8:
                self._warn()
                break
            if bends_down:
                self.shift = max(10 * self.shift, self.xi_b)
                continue
            penalties[:] = [eta1 * nu**2, eta2 / nu]
            if adaptive:  # products are cheap beside the line searches of a poor direction
                accuracy = max(accuracy / (nu if self.matrices else 10), 1e-10)
        n = len(slope)
        return (z[:n], z[n:], descent), accuracy

    def _bends_down(self, z: Tensor) -> bool:
        """Whether a step has no curvature: without eigenvalues, what calls for a larger shift."""
        dx = z[: len(self.point.x)]
        bend = float(dx @ self._curved(dx)) + self.shift * float(dx.square().sum())
        return bend <= 1e-6 * float(dx.square().sum()) and self.shift < 1e8

    def _curved(self, v: Tensor) -> Tensor:
        return self.hessian @ v if self.matrices else self.product(v).detach()

    def _least_shift(self) -> float:
        """What lifts the curvature on the tangents to xi_b where it isn't positive."""
        m, n = self.point.jacobian.shape
        if m == n:
            return 0.0
        tangents = self.hessian
        if m:
            Q, _ = torch.linalg.qr(self.point.jacobian.T, mode="complete")
            tangents = Q[:, m:].T @ self.hessian @ Q[:, m:]
        lowest = float(torch.linalg.eigvalsh((tangents + tangents.T) / 2)[0])
        return self.xi_b - lowest if lowest < 1e-6 else 0.0

    def _solved(self, b: Tensor, accuracy: float, z: Tensor | None) -> Tensor:
        G, n = self.point.jacobian, len(self.point.x)
        if not self.matrices:

            def product(v: Tensor) -> Tensor:
                top = self._curved(v[:n]) + self.shift * v[:n] + G.T @ v[n:]
                return torch.cat([top, G @ v[:n]])

            z, _, made = minres(product, b, tol=accuracy, max_iter=self.max_inner)
            self.inner += made
            return z
        m = len(G)
        K = torch.zeros(n + m, n + m, dtype=b.dtype, device=b.device)
        K[:n, :n] = self.hessian + self.shift * torch.eye(n, dtype=b.dtype, device=b.device)
        K[:n, n:], K[n:, :n] = G.T, G
        if self.solver in ("auto", "dense"):
            if z is None:
                z, trouble = torch.linalg.solve_ex(K, b)
                if trouble or not bool(torch.isfinite(z).all()):  # constraints that became dependent
                    z = least_squares(K, b)
            return z
        kind = "gaussian" if self.solver == "sketch" else "coordinate"
        block = self.block if kind == "gaussian" else 1
        options: dict = {"kind": kind, "block": block, "tol": accuracy, "max_iter": self.max_inner}
        z, _, made = sketch_project(K, b, x0=z, generator=self.generator, **options)
        self.inner += made
        return z

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            message = "penalties passed 1e8: a direction is taken although it descends by less than asked"
            warnings.warn(message, UserWarning, stacklevel=4)
