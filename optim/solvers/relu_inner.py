"""The least-squares step of ADMM for convex ReLU networks: by a factorization, by conjugate gradients, or by blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .conjugate_directions import conjugate_directions
from .relu_program import ReLUProgram

__all__ = ["INNER_SOLVERS", "BlockDescent", "LinearStep"]

INNER_SOLVERS = ("cholesky", "cg", "rbcd")
LARGEST_FACTOR = 8000
"""Unknowns of a dense factor at most: half a gigabyte."""


class LinearStep:
    """u = argmin of ADMM's quadratic: sum over its splits of ||u - t||^2 + ||G u - s||^2 + kappa ||F u - a||^2 (+ T).

    As F sees v - w only, v + w decouples into (k I + X^T X), the same for all patterns since G_i^T G_i = X^T X, and
    z = v - w solves (k I + X^T X) z + 2 kappa F^T F z = r. The paper factors the whole matrix, (2 d P)^3 operations;
    here F's rows are eliminated by the matrix inversion lemma where they are fewer than z's entries, so that an
    iteration costs n d P + n^2: linear in the width.

    Args:
        program: the operators.
        kappa: weight of F's term.
        splits: k, how often u itself is split: 1, or 2 for the robust forms.
        method: "cholesky" or "cg".
    """

    def __init__(self, program: ReLUProgram, kappa: float, splits: int, method: str) -> None:
        self._program, self._kappa, self._splits = program, kappa, splits
        X = program.X
        self._block = splits * torch.eye(X.shape[1], dtype=X.dtype, device=X.device) + X.T @ X
        self._factor = torch.linalg.cholesky(self._block)
        self._solve: Callable[[Tensor], Tensor] = {"cholesky": self._factored, "cg": self._by_cg}[method]()
        self._last: Tensor | None = None
        self.iterations = 0
        self.tolerance = 1e-10

    def __call__(self, rhs: Tensor, a: Tensor, T: Tensor | None) -> Tensor:
        """u (2, P, d) of the sums of targets for u and G u, `rhs`, and those of F u and of the spread."""
        r = rhs[0] - rhs[1] + 2 * self._kappa * self._adjoint(a, T)
        z = self._solve(r)
        q = self._blocks(rhs[0] + rhs[1])
        return torch.stack([(q + z) / 2, (q - z) / 2])

    def _adjoint(self, a: Tensor, T: Tensor | None) -> Tensor:
        z = self._program.outputs_adjoint(a)
        return z if T is None else z + self._program.spread_adjoint(T)

    def _normal(self, z: Tensor) -> Tensor:
        spread = self._program.spread(z) if self._program.epsilon else None
        return z @ self._block + 2 * self._kappa * self._adjoint(self._program.outputs(z), spread)

    def _blocks(self, r: Tensor) -> Tensor:
        """(k I + X^T X)^{-1} of each row."""
        return torch.cholesky_solve(r.T, self._factor).T

    def _factored(self) -> Callable[[Tensor], Tensor]:
        p = self._program
        size, outputs = p.active.shape[0] * p.X.shape[1], len(p.y)
        if not p.epsilon and outputs <= size:
            return self._by_rows(outputs)
        if size > LARGEST_FACTOR:
            raise ValueError(
                f"`inner` is 'cholesky', whose factor has {size} unknowns (patterns times columns); takes at most "
                f"{LARGEST_FACTOR}: choose inner='cg'"
            )
        units = torch.eye(size, dtype=p.X.dtype, device=p.X.device).reshape(size, *p.shape[1:])
        factor = torch.linalg.cholesky(torch.stack([self._normal(unit).flatten() for unit in units]))
        return lambda r: torch.cholesky_solve(r.reshape(-1, 1), factor).reshape(r.shape)

    def _by_rows(self, outputs: int) -> Callable[[Tensor], Tensor]:
        """z = K^{-1} (r - F^T (I/(2 kappa) + F K^{-1} F^T)^{-1} F K^{-1} r), with K the blocks.

        F K^{-1} F^T of two rows is x_k^T K^{-1} x_l times the patterns in which both are active.
        """
        p = self._program
        gram = (p.X @ torch.cholesky_solve(p.X.T, self._factor)) * (p.active.T @ p.active)
        if p.pairs is not None:
            gram = gram[p.pairs[:, 0]] - gram[p.pairs[:, 1]]
            gram = gram[:, p.pairs[:, 0]] - gram[:, p.pairs[:, 1]]
        factor = torch.linalg.cholesky(
            gram + torch.eye(outputs, dtype=gram.dtype, device=gram.device) / (2 * self._kappa)
        )

        def solve(r: Tensor) -> Tensor:
            z = self._blocks(r)
            dual = torch.cholesky_solve(p.outputs(z)[:, None], factor)[:, 0]
            return z - self._blocks(p.outputs_adjoint(dual))

        return solve

    def _by_cg(self) -> Callable[[Tensor], Tensor]:
        """Preconditioned by the blocks, from the last solution; `tolerance` is of its own residual."""

        def solve(r: Tensor) -> Tensor:
            found = conjugate_directions(
                self._normal,
                r,
                propose=self._blocks,
                x0=self._last,
                tolerance=0.0,
                absolute_tolerance=self.tolerance * float(r.norm()),
                max_iterations=10 * r.numel(),
                keep=1,
                normalize=False,
            )
            self._last = found.x
            self.iterations += found.iterations
            return found.x

        return solve


class BlockDescent:
    """Randomized block coordinate descent on ADMM's first step, for a smooth loss that is not split off.

    A pattern i is drawn; its two blocks take a gradient step with Armijo's rule, and the outputs follow by their
    change: the gradient in v_i is X^T D_i l'(F u) + rho (u_i - t_i + X^T X u_i - X^T (2 D_i - I) s_i). Step sizes grow
    by 1.05 where the first trial passes and shrink by 1.5 between draws where it does not, by 2.5 within one.
    Source: arXiv:2201.01965, RBCD.

    Args:
        program: the operators.
        rho: ADMM's penalty.
        generator: draws the patterns.
        max_sweeps: blocks drawn at most, in units of the number of patterns.
    """

    def __init__(self, program: ReLUProgram, rho: float, generator: torch.Generator, max_sweeps: float = 5.0) -> None:
        self._program, self.rho, self._generator = program, rho, generator
        self._draws = max(1, int(max_sweeps * program.shape[1]))
        self._step = 1.0 / (rho * (1 + float(torch.linalg.matrix_norm(program.X, 2)) ** 2))
        self._gram = program.X.T @ program.X
        self.iterations = 0
        self.tolerance = 1e-12

    def __call__(self, u: Tensor, rhs: Tensor) -> Tensor:
        """u after some draws from u, with `rhs` the sum of ADMM's targets t + G^T s."""
        p, u = self._program, u.clone()
        f = torch.einsum("pn,pn->n", p.active, (u[0] - u[1]) @ p.X.T)
        value = self._loss(f)
        order = torch.randint(len(p.active), (self._draws,), generator=self._generator).tolist()
        recent = 0.0
        for count, i in enumerate(order):
            gain, f, value = self._block_step(u, rhs, i, f, value)
            recent = max(gain, 0.7 * recent)
            self.iterations += 1
            if count >= len(p.active) and recent < self.tolerance * max(1.0, value):
                break
        return u

    def _loss(self, f: Tensor) -> float:
        p = self._program
        return float(p.loss.value(p.loss.margin(p.read(f) + p.offset, p.y)).sum())

    def _block_step(self, u: Tensor, rhs: Tensor, i: int, f: Tensor, value: float) -> tuple[float, Tensor, float]:
        """One draw; changes u in place and gives the decrease, the outputs and the loss."""
        p, block = self._program, u[:, i]
        pull = p.unread(p.loss.gradient(p.read(f) + p.offset, p.y)) * p.active[i]
        g = pull @ p.X
        slope = torch.stack([g, -g]) + self.rho * (block + block @ self._gram - rhs[:, i])
        size = float(slope.square().sum())
        if size == 0:
            return 0.0, f, value
        direction = (p.active[i] * (p.X @ (slope[0] - slope[1]))).neg()
        curved = self.rho * float((slope * (slope + slope @ self._gram)).sum())
        linear = self.rho * float((slope * (block + block @ self._gram - rhs[:, i])).sum())
        step = self._step
        for trial in range(30):
            new = f + step * direction
            new_value = self._loss(new)
            decrease = value - new_value + step * linear - step * step * curved / 2
            if decrease >= 1e-3 * step * size:
                self._step = step * 1.05 if trial == 0 else step / 1.5
                u[:, i] = block - step * slope
                return decrease, new, new_value
            step /= 2.5
        return 0.0, f, value
