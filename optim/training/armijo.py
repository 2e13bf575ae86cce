"""A backtracking search along the step that any optimizer takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim import Optimizer

from trimtab.optim.checks import checked_number

__all__ = ["ArmijoStep"]


class ArmijoStep:
    """Scales the step d of an optimizer until f(x + s d) <= f(x) + sufficient s <grad, d>.

    The scale s starts at what the last step ended with, times ``growth``, and is halved as long as the condition fails;
    a step that gains nothing at all is undone. With SGD it is the Armijo line search along the gradient. Moments and
    counters of the optimizer follow its own step, not the scaled one.

    Args:
        optimizer: its learning rate is the step that a scale of 1 takes.
        sufficient: part of the linear decrease that is asked for, > 0.
        growth: >= 1, by which a step may be longer than the last.
        most: halvings of one step.

    Attributes:
        scale: of the last step.
    """

    def __init__(self, optimizer: Optimizer, *, sufficient: float = 0.5, growth: float = 2.0, most: int = 30) -> None:
        self.optimizer = optimizer
        self.sufficient = checked_number("sufficient", sufficient, above=0)
        self.growth = checked_number("growth", growth, least=1)
        self.most = most
        self.scale = 1.0

    @torch.no_grad()
    def step(self, value: float, evaluate: Callable[[], float]) -> int:
        """Takes the step from where gradients stand.

        Args:
            value: of the function there.
            evaluate: its value at the parameters' present place.

        Returns:
            Evaluations made.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        before = [p.clone() for p in parameters]
        self.optimizer.step()
        moves = [p - old for p, old in zip(parameters, before, strict=True)]
        slope = sum(float((p.grad.to(move.dtype) * move).sum()) for p, move in zip(parameters, moves, strict=True))
        scale = self.scale * self.growth
        for count in range(1, self.most + 1):
            for parameter, old, move in zip(parameters, before, moves, strict=True):
                parameter.copy_(old + scale * move)
            if evaluate() <= value + self.sufficient * scale * min(slope, 0.0):
                self.scale = scale
                return count
            scale *= 0.5
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
        self.scale = scale
        return self.most
