"""ADMM on the convex ReLU program: its variables, its scaled multipliers, and one step."""

from __future__ import annotations

import torch
from torch import Tensor

from .anderson import AndersonMixing
from .relu_inner import LinearStep
from .relu_losses import project_robust_cone
from .relu_program import ReLUProgram

__all__ = ["ADMM"]

RELAXATION = 1.7
"""Each split variable sees the least-squares step this much further: in (1, 2) it saves a third of the iterations."""
MIX_EVERY = 5
"""Iterations between two accelerated ones: the history is of plain steps."""


class ADMM:
    """min l(F u) + beta ||v||_{2,1} with u = v, G u = s >= 0, in scaled form (arXiv:2201.01965), and its state.

    A loss that is not quadratic is split off, a = F u; the robust forms also split the spread T, and a second copy p of
    u that shares a cone with s. All copies and their multipliers follow from where the proximal steps start, w = copy +
    multiplier: ADMM is a fixed-point iteration on w, and `acceleration` mixes the last w (Anderson). A mixed w from
    which the next step is longer is dropped for the plain one.

    Args:
        program: the operators.
        inner: "cholesky", "cg" or "rbcd".
        rho: the penalty to begin with.
        start: (2, P, d).
        generator: of "rbcd".
        acceleration: points that are mixed; 0 is plain ADMM.

    Attributes:
        rho: the penalty.
    """

    def __init__(
        self,
        program: ReLUProgram,
        inner: str,
        rho: float,
        start: Tensor,
        generator: torch.Generator,
        acceleration: int = 0,
    ) -> None:
        self._program, self._inner, self.rho, self._generator = program, inner, rho, generator
        # The squared loss is quadratic itself; others are split off. So is it for "rbcd": with it, the step's
        # conditioning is that of 1 / rho, and blocks creep.
        self._direct = not program.epsilon and program.loss.name == "squared" and inner != "rbcd"
        self.u = start
        images = self._images(start)
        self._copies = (start, program.cones(start).clamp_min(0), *images[2:])
        self._duals = tuple(torch.zeros_like(copy) for copy in self._copies)
        self._memory = acceleration
        self._forget()
        self._solver = self._make_solver()
        self._spent = 0

    @property
    def v(self) -> Tensor:
        """(2, P, d), the copy of u with whole blocks at 0."""
        return self._copies[0]

    @property
    def inner_iterations(self) -> int:
        """Steps of the inner solver so far."""
        return self._spent + self._solver.iterations

    def _make_solver(self) -> LinearStep:
        kappa = 1 / self.rho if self._direct else 1.0
        return LinearStep(self._program, kappa, 2 if self._program.epsilon else 1, self._inner, self._generator)

    def _images(self, u: Tensor) -> tuple[Tensor, ...]:
        """What the copies v, s, a, p and T are copies of: u, G u, F u, u and the spread, as far as there are any."""
        program, z = self._program, u[0] - u[1]
        images = (u, program.cones(u))
        if not self._direct:
            images = (*images, program.outputs(z))
        return (*images, u, program.spread(z)) if program.epsilon else images

    def _proximal(self, w: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The copies nearest to w under their own terms of the objective."""
        program, rho = self._program, self.rho
        size = w[0].norm(dim=2, keepdim=True).clamp_min(1e-300)
        v = w[0] * (1 - program.beta / (rho * size)).clamp_min(0)
        if self._direct:
            return v, w[1].clamp_min(0)
        y, offset = program.y, program.offset
        if not program.epsilon:
            return v, w[1].clamp_min(0), program.loss.prox(w[2] + offset, y, rho) - offset
        s, p = project_robust_cone(w[1], w[3], program.epsilon, program.columns)
        a, T = program.loss.robust_prox(w[2] + offset, w[4], y, rho, program.epsilon)
        return v, s, a - offset, p, T

    def _least_squares(self) -> Tensor:
        """u nearest to all copies less their multipliers."""
        program = self._program
        targets = [copy - dual for copy, dual in zip(self._copies, self._duals, strict=True)]
        rhs = targets[0] + program.cones_adjoint(targets[1])
        if program.epsilon:
            rhs = rhs + targets[3]
        a = program.y - program.offset if self._direct else targets[2]
        return self._solver(rhs, a, targets[4] if program.epsilon else None)

    def step(self) -> tuple[float, float]:
        """One iteration; gives the relative primal and dual residuals."""
        self.u = self._least_squares()
        old, duals = self._copies, self._duals
        seen = [torch.lerp(copy, image, RELAXATION) for copy, image in zip(old, self._images(self.u), strict=True)]
        w = tuple(image + dual for image, dual in zip(seen, duals, strict=True))
        self._settle(w)
        primal = _norm([image - copy for image, copy in zip(seen, self._copies, strict=True)])
        dual = _norm([new - copy for new, copy in zip(self._copies, old, strict=True)])
        primal = primal / max(_norm(self._copies), 1e-12)
        dual = dual / max(_norm(self._duals), 1e-12)
        self._solver.tolerance = max(1e-13, min(1e-8, 0.01 * min(primal, dual)))
        if self._memory:
            self._accelerate([copy + dual for copy, dual in zip(old, duals, strict=True)], w)
        return primal, dual

    def _settle(self, w: tuple[Tensor, ...]) -> None:
        self._copies = self._proximal(w)
        self._duals = tuple(each - copy for each, copy in zip(w, self._copies, strict=True))

    def _accelerate(self, before: list[Tensor], after: tuple[Tensor, ...]) -> None:
        """Every so often goes on from a mixture of the last steps in place of the last point."""
        x, step = _flat(before), _flat(after) - _flat(before)
        length = float(step.norm())
        if self._fallback is not None and length > self._fallback[1]:
            plain = self._fallback[0]
            self._forget()
            self._settle(plain)
            return
        self._fallback = None
        mixed = self._mixing.step(x[None], step[None])[0]
        self._count += 1
        if self._count % MIX_EVERY == 0:
            self._fallback = (after, length)
            parts = (x + mixed).split([each.numel() for each in after])
            self._settle(tuple(part.reshape(each.shape) for part, each in zip(parts, after, strict=True)))

    def _forget(self) -> None:
        self._mixing = AndersonMixing(max(1, self._memory), 1e-10, 1e3)
        self._fallback: tuple[tuple[Tensor, ...], float] | None = None
        self._count = 0

    def balance(self, primal: float, dual: float) -> None:
        """Doubles or halves rho where one residual is five times the other, the scaled duals with it."""
        factor = 2.0 if primal > 5 * dual else 0.5 if dual > 5 * primal else 1.0
        if factor == 1.0:
            return
        self.rho *= factor
        self._duals = tuple(dual / factor for dual in self._duals)
        self._forget()
        if self._direct:  # its matrix holds rho
            self._spent += self._solver.iterations
            self._solver = self._make_solver()

    def multipliers(self) -> tuple[Tensor, Tensor]:
        """A subgradient of the loss in the outputs, and the cones' multipliers."""
        program = self._program
        if self._direct:
            a = program.outputs(self.u[0] - self.u[1]) + program.offset
            return program.loss.gradient(a, program.y), -self.rho * self._duals[1]
        return self.rho * self._duals[2], -self.rho * self._duals[1]


def _flat(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _norm(parts: list[Tensor] | tuple[Tensor, ...]) -> float:
    return float(torch.stack([part.square().sum() for part in parts]).sum().sqrt())
