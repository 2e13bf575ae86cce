"""The equation f(x) = y solved by its residual alone: no gradient, no Jacobian, one call of f an iteration."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from .anderson import AndersonMixing

__all__ = ["FixedPointState", "check_solver_options", "fixed_point"]

DIVERGENCE = 10.0
"""A residual this many times its first one ends a row's run."""


@dataclass(frozen=True)
class FixedPointState:
    """Where the iteration is after a call of f.

    Attributes:
        iteration: k, 0 at the start.
        x: (B, ...), the point x_k; float32, or float64 where the solver was given that.
        value: (B, ...), f(x_k).
        residual: (B,) on the CPU, root mean square of f(x_k) - y over a row's entries.
        best_residual: (B,) on the CPU, the least so far.
        improved: (B,) bool on the CPU, rows where this call of f gave a residual no larger than any before. Under
            acceleration the others show their best point again.
        stopped: (B,) bool on the CPU, rows whose run is over: within the tolerance, or diverged and back at their
            best point, which `x`, `value` and `residual` then are.
        num_function_evaluations: calls of f so far.
    """

    iteration: int
    x: torch.Tensor
    value: torch.Tensor
    residual: torch.Tensor
    best_residual: torch.Tensor
    improved: torch.Tensor
    stopped: torch.Tensor
    num_function_evaluations: int


def fixed_point(
    f: Callable[[torch.Tensor], torch.Tensor],
    y: torch.Tensor,
    x0: torch.Tensor,
    *,
    step_size: float | torch.Tensor,
    max_iterations: int = 8,
    acceleration: Literal["none", "anderson"] = "none",
    memory: int = 3,
    regularization: float = 1e-2,
    step_limit: float = 8.0,
    tolerance: float | None = None,
    project: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[FixedPointState]:
    """Iterates x_{k+1} = x_k - step_size (f(x_k) - y), row by row, and gives a state after each call of f.

    This is the update of "FlowOpt: Fast Optimization Through Whole Flow Processes for Training-Free Editing"
    (arXiv:2510.22010): gradient descent on ||f(x) - y||^2 / 2 with the identity in place of the Jacobian's transpose.
    Where 0 < step_size < 2 <x - x', f(x) - f(x')> / ||f(x) - f(x')||^2 for all pairs, the distance to a solution and
    the residual never rise. `x` is at least float32: the update is far below the spacing of half precision's numbers.

    With `acceleration="anderson"` the same iteration is extrapolated from its last points (`AndersonMixing`) at the
    same one call of f an iteration. It is safeguarded: where a step raised a row's residual, the row shows its best
    point again, forgets its history and takes the plain step from there, and half of it where that was tried already.

    Without acceleration a row whose residual exceeds ten times its first one, or is not finite, goes back to its best
    point and rests, with a warning. The run ends when every row rests.

    Args:
        f: (B, ...) to the same shape, rows independently.
        y: (B, ...), what f is to give.
        x0: (B, ...), where to start.
        step_size: > 0, for all rows, or (B,).
        max_iterations: updates K >= 0, so K + 1 calls of f.
        acceleration: "none" is the paper's update.
        memory: pairs that Anderson mixing keeps, >= 1; two tensors like `x0` each.
        regularization: >= 0, of its least squares, relative to the mean of the Gram matrix's diagonal.
        step_limit: an accelerated step is at most this many times the plain one's length.
        tolerance: a row whose residual is at most this rests. None: none does.
        project: applied to each update before it is made, such as a mask's product; linear.

    Yields:
        A state for k = 0 to K, fewer where all rows rest.

    Raises:
        ValueError: an argument out of its range, or f(x0) of another shape than y.
        RuntimeError: f(x0) is not finite.

    Example:
        >>> A = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
        >>> y = torch.tensor([[1.0, 2.0]])
        >>> states = list(fixed_point(lambda x: x @ A.T, y, torch.zeros(1, 2), step_size=0.8, max_iterations=20))
        >>> states[0].residual.item() > 1e3 * states[-1].residual.item()
        True
    """
    check_solver_options(max_iterations, acceleration, memory, regularization, step_limit, tolerance)
    dtype = torch.promote_types(torch.promote_types(x0.dtype, y.dtype), torch.float32)
    x, y = x0.detach().to(dtype), y.detach().to(dtype)
    if x.shape != y.shape:
        raise ValueError(f"`x0` has shape {tuple(x.shape)}; takes that of `y`, {tuple(y.shape)}")
    del x0
    eta = _checked_step_size(step_size, x)
    mixing = AndersonMixing(memory, regularization, step_limit) if acceleration == "anderson" else None
    damping, was_plain = torch.ones(len(x), dtype=x.dtype), torch.ones(len(x), dtype=torch.bool)
    best: _Best | None = None
    stopped = torch.zeros(len(x), dtype=torch.bool)
    for iteration in range(max_iterations + 1):
        with torch.no_grad():  # not as a decorator, which would hold each state while f runs
            value = f(x).to(dtype)
            if value.shape != y.shape:
                raise ValueError(f"`f` gives shape {tuple(value.shape)} for `y` of shape {tuple(y.shape)}")
            residual = value - y
            size = _rms(residual).cpu()
            if best is None:
                if not bool(torch.isfinite(size).all()):
                    raise RuntimeError("f(x0) is not finite: there is nothing to start from")
                best = _Best(x, value, size)
            improved = best.update(x, value, size)
            if mixing is None:  # which goes back by itself
                stopped = stopped | _diverged(stopped, size, best, iteration, eta)
            back = stopped if mixing is None else stopped | ~improved
            x, value, size = best.restored(back, x, value, size)
            if tolerance is not None:
                stopped = stopped | (size <= tolerance)
        yield FixedPointState(iteration, x, value, size, best.residual, improved, stopped.clone(), iteration + 1)
        if iteration == max_iterations or bool(stopped.all()):
            return
        with torch.no_grad():
            if mixing is None:
                step = -eta * residual
            else:
                damping = torch.where(
                    improved, (2 * damping).clamp_max(1), torch.where(was_plain, damping / 2, damping)
                )
                was_plain = ~improved
                step = mixing.step(x, -eta * damping.to(x.device).reshape(eta.shape) * (value - y), forget=~improved)
            if project is not None:
                step = project(step)
            x = torch.where(_over(stopped, x), x, x + step)
        del value, residual, step  # nothing but x and y is held while f runs


def _diverged(
    stopped: torch.Tensor, size: torch.Tensor, best: _Best, iteration: int, eta: torch.Tensor
) -> torch.Tensor:
    """(B,) the rows whose residual is far beyond its start, with a warning that names them."""
    diverged = ~stopped & ~(size <= DIVERGENCE * best.first)
    if bool(diverged.any()):
        rows = diverged.nonzero().flatten().tolist()
        warnings.warn(
            f"the residual of row {rows} is beyond {DIVERGENCE:g} times its start at iteration {iteration} with "
            f"`step_size` {eta.flatten()[rows].tolist()}: the run ends there with its best state",
            stacklevel=3,
        )
    return diverged


def check_solver_options(
    max_iterations: int,
    acceleration: str,
    memory: int,
    regularization: float,
    step_limit: float,
    tolerance: float | None,
    *,
    name: str = "max_iterations",
) -> None:
    """Raises ValueError for an option of `fixed_point` out of its range; `name` is what the caller calls K."""
    if isinstance(max_iterations, bool) or not isinstance(max_iterations, int):
        raise TypeError(f"`{name}` is a {type(max_iterations).__name__}; takes an integer")
    if max_iterations < 0:
        raise ValueError(f"`{name}` is {max_iterations}; takes an integer >= 0")
    if acceleration not in ("none", "anderson"):
        raise ValueError(f"`acceleration` is {acceleration!r}; takes 'none' or 'anderson'")
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ValueError(f"`memory` is {memory!r}; takes an integer >= 1")
    if not 0 <= regularization < float("inf"):
        raise ValueError(f"`regularization` is {regularization}; takes a number >= 0")
    if not step_limit > 0:
        raise ValueError(f"`step_limit` is {step_limit}; takes a number > 0")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"`tolerance` is {tolerance}; takes None or a number >= 0")


class _Best:
    """Each row's point of least residual, kept on the host."""

    def __init__(self, x: torch.Tensor, value: torch.Tensor, residual: torch.Tensor) -> None:
        self.first = residual.clone()
        self.residual = residual.clone()
        self._x, self._value = x.to("cpu", copy=True), value.to("cpu", copy=True)

    def update(self, x: torch.Tensor, value: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Takes in the rows that are at least as good as their best; gives a mask of them."""
        improved = residual <= self.residual
        if bool(improved.any()):
            rows = improved.nonzero().flatten()
            self._x[rows], self._value[rows] = x[rows.to(x.device)].cpu(), value[rows.to(x.device)].cpu()
            self.residual = torch.where(improved, residual, self.residual)
        return improved

    def restored(
        self, rows: torch.Tensor, x: torch.Tensor, value: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The arguments with these rows replaced by their best."""
        if not bool(rows.any()):
            return x, value, residual
        chosen = _over(rows, x)
        x, value = (torch.where(chosen, a.to(b.device), b) for a, b in ((self._x, x), (self._value, value)))
        return x, value, torch.where(rows, self.residual, residual)


def _checked_step_size(step_size: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    eta = torch.as_tensor(step_size, dtype=x.dtype, device=x.device)
    if eta.ndim > 1 or (eta.ndim == 1 and len(eta) != len(x)):
        raise ValueError(f"`step_size` has shape {tuple(eta.shape)}; takes a number or one for each of {len(x)} rows")
    if not bool(((eta > 0) & torch.isfinite(eta)).all()):
        raise ValueError(f"`step_size` is {eta.tolist()}; takes a finite number > 0")
    return eta.expand(len(x)).reshape(-1, *[1] * (x.ndim - 1))


def _rms(residual: torch.Tensor) -> torch.Tensor:
    return residual.flatten(1).square().mean(1).sqrt()


def _over(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask of rows that broadcasts over their entries."""
    return rows.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
