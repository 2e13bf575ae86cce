"""The least-squares step of ADMM for convex ReLU networks: by a factorization, by conjugate gradients, or by blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .conjugate_directions import conjugate_directions
from .relu_program import ReLUProgram

__all__ = ["INNER_SOLVERS", "LinearStep"]

INNER_SOLVERS = ("cholesky", "cg", "rbcd")
LARGEST_FACTOR = 8000
"""Unknowns of a dense factor at most: half a gigabyte."""
MAX_SWEEPS = 30
"""Of block coordinate descent, over all patterns, an iteration of ADMM."""


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
        method: "cholesky", "cg" or "rbcd".
        generator: of "rbcd".
    """

    def __init__(
        self, program: ReLUProgram, kappa: float, splits: int, method: str, generator: torch.Generator
    ) -> None:
        self._program, self._kappa, self._splits, self._generator = program, kappa, splits, generator
        X = program.X
        self._block = splits * torch.eye(X.shape[1], dtype=X.dtype, device=X.device) + X.T @ X
        self._factor = torch.linalg.cholesky(self._block)
        ways = {"cholesky": self._factored, "cg": self._by_cg, "rbcd": self._by_blocks}
        self._solve: Callable[[Tensor], Tensor] = ways[method]()
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

    def _by_blocks(self) -> Callable[[Tensor], Tensor]:
        """Randomized block coordinate descent (arXiv:2201.01965, RBCD), from the last solution.

        A pattern is drawn, its block of z takes a gradient step, and the outputs follow by their change, n d
        operations. Our choices: the gradient is preconditioned by (k I + X^T X), which all blocks share, and the step
        along it is exact in place of Armijo's, as the loss is split off. It stops where a sweep's mean decrease is
        small, or after `MAX_SWEEPS`.
        """
        p, kappa = self._program, 2 * self._kappa
        inverse = torch.cholesky_inverse(self._factor)
        count = len(p.active)

        def solve(r: Tensor) -> Tensor:
            z = torch.zeros_like(r) if self._last is None else self._last
            f = torch.einsum("pn,pn->n", p.active, z @ p.X.T)
            enough = self.tolerance * float((r * (r @ inverse)).sum())
            for _ in range(MAX_SWEEPS):
                gained = r.new_zeros(())
                for i in torch.randperm(count, generator=self._generator).tolist():
                    g = z[i] @ self._block + kappa * ((p.active[i] * p.unread(p.read(f))) @ p.X) - r[i]
                    step = g @ inverse
                    change = p.active[i] * (p.X @ step)
                    slope = g @ step
                    length = slope / (slope + kappa * p.read(change).square().sum()).clamp_min(1e-300)
                    z[i] -= length * step
                    f = f - length * change
                    gained = gained + length * slope
                self.iterations += count
                if float(gained) <= enough:
                    break
            self._last = z
            return z.clone()

        return solve
