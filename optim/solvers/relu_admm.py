"""ADMM on the convex ReLU program: its variables, its scaled multipliers, and one step."""

from __future__ import annotations

import torch
from torch import Tensor

from .relu_inner import BlockDescent, LinearStep
from .relu_losses import project_robust_cone
from .relu_program import ReLUProgram

__all__ = ["ADMM"]

RELAXATION = 1.7
"""Each split variable sees the least-squares step this much further: in (1, 2) it saves a third of the iterations."""


class ADMM:
    """min l(F u) + beta ||v||_{2,1} with u = v, G u = s >= 0, in scaled form (arXiv:2201.01965), and its state.

    A loss that is not quadratic is split off, a = F u; the robust forms also split the spread T, and a second copy p of
    u that shares a cone with s.

    Args:
        program: the operators.
        inner: "cholesky", "cg" or "rbcd".
        rho: the penalty to begin with.
        start: (2, P, d).
        generator: of "rbcd".

    Attributes:
        u: (2, P, d), the least-squares variable.
        v: (2, P, d), that with whole blocks at 0.
        s: (2, P, n), in the cones.
        rho: the penalty.
    """

    def __init__(self, program: ReLUProgram, inner: str, rho: float, start: Tensor, generator: torch.Generator) -> None:
        self._program, self._inner, self.rho, self._generator = program, inner, rho, generator
        # The squared loss is quadratic itself and "rbcd" takes a smooth one as it is; others are split off.
        self._direct = not program.epsilon and (program.loss.name == "squared" or inner == "rbcd")
        self.u = self.v = start
        self.s = program.cones(start).clamp_min(0)
        self._lam, self._nu = torch.zeros_like(self.v), torch.zeros_like(self.s)
        z = start[0] - start[1]
        self._a, self._mu = program.outputs(z), torch.zeros_like(program.y)
        self._p = start if program.epsilon else None
        self._lam_p = torch.zeros_like(start) if program.epsilon else None
        self._T = program.spread(z) if program.epsilon else None
        self._mu_T = torch.zeros_like(self._T) if self._T is not None else None
        self._solver = self._make_solver()
        self._spent = 0

    @property
    def inner_iterations(self) -> int:
        """Steps of the inner solver so far."""
        return self._spent + self._solver.iterations

    def _make_solver(self) -> LinearStep | BlockDescent:
        if self._inner == "rbcd":
            return BlockDescent(self._program, self.rho, self._generator)
        kappa = 1 / self.rho if self._direct else 1.0
        return LinearStep(self._program, kappa, 2 if self._program.epsilon else 1, self._inner)

    def step(self) -> tuple[float, float]:
        """One iteration; gives the relative primal and dual residuals."""
        program, rho = self._program, self.rho
        rhs = self.v - self._lam + program.cones_adjoint(self.s - self._nu)
        if self._p is not None:
            rhs = rhs + self._p - self._lam_p
        if isinstance(self._solver, BlockDescent):
            self.u = self._solver(self.u, rhs)
        else:
            a = program.y - program.offset if self._direct else self._a - self._mu
            T = None if self._T is None else self._T - self._mu_T
            self.u = self._solver(rhs, a, T)
        z = self.u[0] - self.u[1]
        u, Gu = _relaxed(self.u, self.v), _relaxed(program.cones(self.u), self.s)
        gaps, moves, sizes = [], [], []

        def split(value: Tensor, dual: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
            gaps.append(value - new)
            moves.append(new - old)
            sizes.extend([new, dual])
            return new, dual + value - new

        shrunk = u + self._lam
        shrunk = shrunk * (1 - program.beta / (rho * shrunk.norm(dim=2, keepdim=True).clamp_min(1e-300))).clamp_min(0)
        self.v, self._lam = split(u, self._lam, self.v, shrunk)
        if self._p is None:
            self.s, self._nu = split(Gu, self._nu, self.s, (Gu + self._nu).clamp_min(0))
        else:
            s, p = project_robust_cone(
                Gu + self._nu, _relaxed(self.u, self._p) + self._lam_p, program.epsilon, program.columns
            )
            self.s, self._nu = split(Gu, self._nu, self.s, s)
            self._p, self._lam_p = split(_relaxed(self.u, self._p), self._lam_p, self._p, p)
        if not self._direct:
            Fu = _relaxed(program.outputs(z), self._a)
            a0, y, offset = Fu + self._mu + program.offset, program.y, program.offset
            if self._T is None:
                a = program.loss.prox(a0, y, rho) - offset
            else:
                spread = _relaxed(program.spread(z), self._T)
                a, T = program.loss.robust_prox(a0, spread + self._mu_T, y, rho, program.epsilon)
                a = a - offset
                self._T, self._mu_T = split(spread, self._mu_T, self._T, T)
            self._a, self._mu = split(Fu, self._mu, self._a, a)
        new_size, dual_size = _norm(sizes[::2]), _norm(sizes[1::2])
        primal = _norm(gaps) / max(new_size, 1e-12)
        dual = _norm(moves) / max(dual_size, 1e-12)
        self._solver.tolerance = max(1e-13, min(1e-8, 0.01 * min(primal, dual)))
        return primal, dual

    def balance(self, primal: float, dual: float) -> None:
        """Doubles or halves rho where one residual is five times the other, the scaled duals with it."""
        factor = 2.0 if primal > 5 * dual else 0.5 if dual > 5 * primal else 1.0
        if factor == 1.0:
            return
        self.rho *= factor
        self._lam, self._nu, self._mu = (value / factor for value in (self._lam, self._nu, self._mu))
        if self._lam_p is not None:
            self._lam_p, self._mu_T = self._lam_p / factor, self._mu_T / factor
        if isinstance(self._solver, BlockDescent):
            self._solver.rho = self.rho
        elif self._direct:  # its matrix holds rho
            self._spent += self._solver.iterations
            self._solver = self._make_solver()

    def multipliers(self) -> tuple[Tensor, Tensor]:
        """A subgradient of the loss in the outputs, and the cones' multipliers."""
        program = self._program
        if self._direct:
            a = program.outputs(self.u[0] - self.u[1]) + program.offset
            return program.loss.gradient(a, program.y), -self.rho * self._nu
        return self.rho * self._mu, -self.rho * self._nu


def _relaxed(value: Tensor, last: Tensor) -> Tensor:
    return torch.lerp(last, value, RELAXATION)


def _norm(parts: list[Tensor]) -> float:
    return float(torch.stack([part.square().sum() for part in parts]).sum().sqrt())
