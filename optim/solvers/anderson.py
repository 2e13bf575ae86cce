"""Anderson mixing, type II: the next point of a fixed-point iteration from its last few."""

from __future__ import annotations

import torch

__all__ = ["AndersonMixing"]


class AndersonMixing:
    """Extrapolates x <- x + G(x) from the last points, each row of a batch by itself.

    With dX, dG the differences of the last points and steps, the combination of steps that is smallest decides:

        gamma = argmin ||G_k - dG gamma||^2 + regularization mean(diag(dG^T dG)) ||gamma||^2
        x_{k+1} = x_k + G_k - (dX + dG) gamma

    Source: H. Walker, P. Ni, "Anderson Acceleration for Fixed-Point Iterations" (SIAM J. Numer. Anal. 49, 2011),
    equations 2.1 to 2.3 in the unconstrained form. It calls no function itself; it keeps 2 `memory` tensors.

    Args:
        memory: differences kept, >= 1.
        regularization: >= 0.
        step_limit: the step is at most this many times as long as G_k.

    Example:
        >>> mixing, x = AndersonMixing(2, 0.0, 100.0), torch.tensor([[1.0, 1.0]])
        >>> for _ in range(4):  # x <- x - (2 x_1, x_2 / 2) / 2 has its fixed point at 0
        ...     x = x + mixing.step(x, -0.5 * x * torch.tensor([2.0, 0.5]))
        >>> bool(x.norm() < 1e-5)
        True
    """

    def __init__(self, memory: int, regularization: float, step_limit: float) -> None:
        self.memory, self.regularization, self.step_limit = memory, regularization, step_limit
        self._points: list[torch.Tensor] = []
        self._steps: list[torch.Tensor] = []
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def step(self, x: torch.Tensor, plain: torch.Tensor, *, forget: torch.Tensor | None = None) -> torch.Tensor:
        """The step from a point.

        Args:
            x: (B, ...), the point.
            plain: (B, ...), G(x), the step without acceleration.
            forget: (B,) bool, rows that start afresh with their plain step.

        Returns:
            (B, ...), what to add to `x`.
        """
        point, step = x.flatten(1), plain.flatten(1)
        if self._last is not None:
            self._points = [*self._points, point - self._last[0]][-self.memory :]
            self._steps = [*self._steps, step - self._last[1]][-self.memory :]
        self._last = (point.clone(), step.clone())
        if not self._points:
            return plain
        if forget is not None and bool(forget.any()):
            keep = (~forget).to(step.device, step.dtype).unsqueeze(1)  # a row without history has differences of 0
            self._points = [column * keep for column in self._points]
            self._steps = [column * keep for column in self._steps]
        mixed = step - self._combination(step)
        longest = self.step_limit * step.norm(dim=1, keepdim=True)
        length = mixed.norm(dim=1, keepdim=True).clamp_min(torch.finfo(mixed.dtype).tiny)
        return (mixed * (longest / length).clamp_max(1)).reshape(plain.shape)

    def _combination(self, step: torch.Tensor) -> torch.Tensor:
        """(dX + dG) gamma, with gamma solved for in float64 on the host: memory x memory numbers a row."""
        rows = [torch.stack([(a * b).sum(1) for b in (*self._steps, step)], 1) for a in self._steps]
        products = torch.stack(rows, 1).double().cpu()
        gram, right = products[..., :-1], products[..., -1:]
        diagonal = gram.diagonal(dim1=1, dim2=2)
        ridge = self.regularization * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
        gram = gram + torch.diag_embed((ridge + 1e-12 * diagonal).expand_as(diagonal))
        gamma = torch.linalg.solve(gram, right).to(step.device, step.dtype)
        columns = (point + change for point, change in zip(self._points, self._steps, strict=True))
        return sum(column * gamma[:, index] for index, column in enumerate(columns))
