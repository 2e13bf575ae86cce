"""Several parameter updates for each gradient of an expensive loss, by a surrogate in the space of the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trimtab.optim.checks import checked_choice, checked_count, checked_number

from .armijo import ArmijoStep

__all__ = ["SurrogateStep", "TargetSurrogate"]

SCHEDULES = ("constant", "sqrt", "exponential")


@dataclass(frozen=True)
class SurrogateStep:
    """What one outer step did.

    Attributes:
        loss: the loss at its start, None where only a gradient was given.
        surrogate: the surrogate's values less the loss at its start: 0 first, then after each inner step but the last.
        inner_steps: updates of the parameters.
        model_passes: forward passes of the model, of which ``inner_steps`` went backward too.
        loss_calls: evaluations of the loss or of its gradient; 1 unless the step in the outputs was searched.
        eta: the step in the outputs.
        target_move: ||f(new parameters) - z||, where the upper bound was checked, else at the last inner step.
        grad_norm: ||gradient of the loss by the outputs||.
        upper_bound_ok: whether the loss at the end lies under the surrogate; None unless that was asked for.
    """

    loss: float | None
    surrogate: list[float]
    inner_steps: int
    model_passes: int
    loss_calls: int
    eta: float
    target_move: float
    grad_norm: float
    upper_bound_ok: bool | None


class TargetSurrogate:
    """Minimizes l(f(theta)) where the gradient of l costs much more than a pass of the model f.

    With z_t = f(theta_t) and g_t the gradient of l at z_t, the one expensive call, the parameters go several steps of
    ``optimizer`` down

        surrogate(theta) = <g_t, f(theta) - z_t> + ||f(theta) - z_t||^2 / (2 eta)

    which lies above l(f(theta)) - l(z_t) for eta <= 1 / L, L the smoothness of l. It is the least-squares fit of f to
    z_t - eta g_t. With one inner step of SGD it is SGD for every eta. The expensive part may be a reward model, a
    teacher, or a black box whose gradient is estimated from values.

    Source: Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, "Target-based Surrogates for Stochastic Optimization"
    (arXiv 2302.02607), their SSO when batches are drawn. It pays where a gradient of l costs more than the inner
    passes, which it always needs more of. On mini-batches many inner steps fit the batch alone: 10 is a good number.

    Args:
        optimizer: over what is trained.
        eta: step in the outputs, > 0, in the loss's units: a mean over n samples wants n times that of their sum.
        inner_steps: m >= 1.
        schedule: "constant", "sqrt" for eta / sqrt(t) or "exponential" for eta (1 / T)^(t / T), t from 1.
        inner_tol: inner steps end when the surrogate's gradient has a norm below this, >= 0.
        reset_inner_state: whether the optimizer forgets its moments before each outer step.
        line_search: Armijo search along each inner step; see :class:`ArmijoStep`.
        target_line_search: halves eta until l(z - eta g) <= l(z) - eta ||g||^2 / 2; needs ``loss`` and its evaluations.
        check_upper_bound: evaluates the loss once more at the end; needs ``loss``.
        total_steps: T of "exponential".

    Raises:
        ValueError, TypeError: an argument out of range.

    Example:
        >>> x = torch.nn.Parameter(torch.zeros(2))
        >>> fit = TargetSurrogate(torch.optim.SGD([x], lr=0.5), eta=1.0, inner_steps=5)
        >>> step = fit.step(lambda: 2 * x, loss=lambda z: 0.5 * (z - 1).square().sum())
        >>> step.inner_steps, step.loss_calls, round(step.loss, 3)
        (5, 1, 1.0)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        eta: float = 1.0,
        inner_steps: int = 10,
        schedule: str = "constant",
        inner_tol: float = 0.0,
        reset_inner_state: bool = False,
        line_search: bool = False,
        target_line_search: bool = False,
        check_upper_bound: bool = False,
        total_steps: int | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` is a {type(optimizer).__name__}; takes a torch.optim.Optimizer")
        self.optimizer = optimizer
        self.eta = checked_number("eta", eta, above=0)
        self.inner_steps = checked_count("inner_steps", inner_steps)
        self.schedule = checked_choice("schedule", schedule, SCHEDULES)
        self.inner_tol = checked_number("inner_tol", inner_tol, least=0)
        if schedule == "exponential" and total_steps is None:
            raise ValueError("`total_steps` is None; the schedule 'exponential' takes a number")
        self.total_steps = None if total_steps is None else checked_count("total_steps", total_steps)
        self.reset_inner_state = bool(reset_inner_state)
        self.target_line_search = bool(target_line_search)
        self.check_upper_bound = bool(check_upper_bound)
        self._search = ArmijoStep(optimizer) if line_search else None
        self.t = 0

    @property
    def present_eta(self) -> float:
        """eta of the step that comes next."""
        t = self.t + 1
        if self.schedule == "sqrt":
            return self.eta / math.sqrt(t)
        if self.schedule == "exponential":
            return self.eta * (1.0 / self.total_steps) ** (t / self.total_steps)
        return self.eta

    def step(
        self,
        forward: Callable[[], Tensor],
        target_grad: Tensor | Callable[[Tensor], Tensor] | None = None,
        *,
        loss: Callable[[Tensor], Tensor] | None = None,
    ) -> SurrogateStep:
        """One expensive gradient and up to ``inner_steps`` updates.

        Args:
            forward: gives the outputs z, any shape, with a graph to the parameters; the same for the same parameters,
                so the same prompts, noise and dropout. Called ``inner_steps`` times, and once more in the first step.
            target_grad: the gradient at z, shaped like it, or a function of the detached z that gives it.
            loss: in its place, a function of z that gives a 0-d tensor.

        Raises:
            ValueError: both or neither of ``loss`` and ``target_grad``, a gradient of another shape or not finite, or a
                search or check that needs ``loss``.
            RuntimeError: z needs no gradient, or two calls of ``forward`` differ.
        """
        if (loss is None) == (target_grad is None):
            given = "both" if loss is not None else "neither"
            raise ValueError(f"got {given} of `loss` and `target_grad`; takes exactly one")
        if loss is None and (self.target_line_search or self.check_upper_bound):
            raise ValueError("`loss` is None; `target_line_search` and `check_upper_bound` take it")
        outputs = self._forward(forward)
        passes = 1
        if self.t == 0:
            passes += 1
            if not torch.equal(outputs, forward()):
                raise RuntimeError("two calls of `forward` differ; takes the same outputs for the same parameters")
        centre = outputs.detach().clone()
        value, gradient = self._gradient(centre, target_grad, loss)
        eta, calls = self.present_eta, 1
        if self.target_line_search:
            eta, searched = self._searched_eta(centre, gradient, value, loss, eta)
            calls += searched
        if self.reset_inner_state:
            self.optimizer.state.clear()
        surrogate, move, taken, more = self._descend(forward, outputs, centre, gradient, eta)
        passes += more
        bound = None
        if self.check_upper_bound:
            with torch.no_grad():
                final = forward()
                move = _wide(final) - _wide(centre)
                calls, passes = calls + 1, passes + 1
                top = value + _surrogate(move, gradient, eta).item()
                bound = bool(loss(final).item() <= top + 1e-6 * max(1.0, abs(top)))
        self.t += 1
        return SurrogateStep(
            value, surrogate, taken, passes, calls, eta, float(move.norm()), float(gradient.norm()), bound
        )

    def state_dict(self) -> dict[str, Any]:
        """The step's number, the search's scale and the optimizer's state."""
        scale = None if self._search is None else self._search.scale
        return {"t": self.t, "scale": scale, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        self.t = int(state["t"])
        if self._search is not None and state["scale"] is not None:
            self._search.scale = float(state["scale"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _forward(self, forward: Callable[[], Tensor]) -> Tensor:
        outputs = forward()
        if not isinstance(outputs, Tensor):
            raise TypeError(f"`forward` gives a {type(outputs).__name__}; takes one that gives a tensor")
        if not outputs.requires_grad:
            raise RuntimeError("`forward` gives outputs without a graph; takes one that depends on the parameters")
        return outputs

    def _gradient(
        self,
        centre: Tensor,
        target_grad: Tensor | Callable[[Tensor], Tensor] | None,
        loss: Callable[[Tensor], Tensor] | None,
    ) -> tuple[float | None, Tensor]:
        value = None
        if loss is not None:
            point = centre.clone().requires_grad_()
            with torch.enable_grad():
                result = loss(point)
            (gradient,) = torch.autograd.grad(result, point)
            value = float(result.detach())
        else:
            gradient = target_grad if isinstance(target_grad, Tensor) else target_grad(centre)
        if not isinstance(gradient, Tensor) or gradient.shape != centre.shape:
            got = tuple(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
            raise ValueError(f"`target_grad` has shape {got}; takes {tuple(centre.shape)}, the outputs'")
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError(f"the gradient by the outputs is not finite in outer step {self.t + 1}")
        return value, _wide(gradient.detach())

    def _searched_eta(
        self, centre: Tensor, gradient: Tensor, value: float, loss: Callable[[Tensor], Tensor], eta: float
    ) -> tuple[float, int]:
        square = float(gradient.square().sum())
        calls = 0
        while calls < 30:
            calls += 1
            with torch.no_grad():
                moved = float(loss((_wide(centre) - eta * gradient).to(centre.dtype)))
            if moved <= value - 0.5 * eta * square:
                break
            eta *= 0.5
        return eta, calls

    def _descend(
        self, forward: Callable[[], Tensor], outputs: Tensor, centre: Tensor, gradient: Tensor, eta: float
    ) -> tuple[list[float], Tensor, int, int]:
        """Inner steps; gives the surrogate's values, the last move, how many steps and further passes there were."""
        values, passes = [], 0
        for index in range(self.inner_steps):
            if index:
                outputs, passes = forward(), passes + 1
            # the small difference of two outputs is taken in float32
            move = _wide(outputs) - _wide(centre)
            surrogate = _surrogate(move, gradient, eta)
            self.optimizer.zero_grad()
            surrogate.backward()
            values.append(float(surrogate.detach()))
            if not math.isfinite(values[-1]):
                raise RuntimeError(f"the surrogate is {values[-1]} in inner step {index + 1}; lower the learning rate")
            if self.inner_tol > 0.0 and _gradient_norm(self.optimizer) < self.inner_tol:
                return values, move.detach(), index, passes
            if self._search is None:
                self.optimizer.step()
            else:
                passes += self._search.step(
                    values[-1], lambda: float(_surrogate(_wide(forward()) - _wide(centre), gradient, eta))
                )
        return values, move.detach(), self.inner_steps, passes


def _surrogate(move: Tensor, gradient: Tensor, eta: float) -> Tensor:
    return (gradient * move).sum() + move.square().sum() / (2.0 * eta)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _gradient_norm(optimizer: Optimizer) -> float:
    norms = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return float(torch.stack(norms).norm())
