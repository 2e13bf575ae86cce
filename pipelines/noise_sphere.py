"""Gradient steps of a given length on the sphere that noise lies on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["SphereMomentum"]


class SphereMomentum(torch.optim.Optimizer):
    """Nesterov's momentum with normalized gradients, each parameter kept at the norm that it starts with.

    With g the gradient less its part along z, at root mean square 1,

        v <- momentum v + g,    z <- ||z_0|| (z - lr u) / ||z - lr u||,    u = g + momentum v    (v again tangent)

    so that a step's length depends on `lr` alone, not on how a reward is scaled, and the noise keeps its norm: of
    ReNO's regularizer, which acts along z, the limit of a large weight. Noise of d elements has norm sqrt(d), so `lr`
    is the step relative to its standard deviation. Ours; the ideas are standard: normalized gradient descent and
    retraction to a manifold (Absil et al., "Optimization Algorithms on Matrix Manifolds", chapter 4).

    Args:
        params: parameters, each a point on a sphere of its own.
        lr: > 0, relative step.
        momentum: in [0, 1).
        nesterov: look ahead by one step of the momentum.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> z = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = SphereMomentum([z], lr=0.1)
        >>> z.grad = torch.tensor([-1.0, 0.0])
        >>> optimizer.step()
        >>> bool(z[0] > 3), round(z.norm().item(), 5)
        (True, 5.0)
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.015, *, momentum: float = 0.9, nesterov: bool = True
    ) -> None:
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"`lr` is {lr}; takes a finite number > 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` is {momentum}; takes a number in [0, 1)")
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a parameter without a gradient, or with none along the sphere, goes on with its momentum."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["norm"] = torch.linalg.vector_norm(parameter)
            state["velocity"] = torch.zeros_like(parameter)
        gradient = _tangent(parameter.grad, parameter)
        length = torch.linalg.vector_norm(gradient)
        rounding = 1e-6 * torch.linalg.vector_norm(parameter.grad)  # what is left of a gradient along z
        unit = torch.where(length > rounding, math.sqrt(gradient.numel()) / length, 0.0)
        gradient = gradient * unit
        velocity = state["velocity"].mul_(group["momentum"]).add_(gradient)
        update = gradient + group["momentum"] * velocity if group["nesterov"] else velocity
        parameter.sub_(update, alpha=group["lr"])
        parameter.mul_(state["norm"] / torch.linalg.vector_norm(parameter))
        velocity.copy_(_tangent(velocity, parameter))


def _tangent(vector: Tensor, point: Tensor) -> Tensor:
    """The vector without its part along the point."""
    return vector - point * ((vector * point).sum() / point.square().sum())
