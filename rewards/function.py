"""Any function of pictures and prompts as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import RewardModel

__all__ = ["CallableReward"]


class CallableReward(RewardModel):
    """A function's values, one a picture, higher is better.

    Args:
        function: takes pictures (B, 3, H, W) in [0, 1] and a list of B prompts; returns B numbers, as a tensor, an
            array or a list.
        differentiable: whether the numbers are a tensor with a gradient with respect to the pictures. If not, the
            function is called on pictures without one.
        name: in reports; the function's own by default.

    Raises:
        TypeError: if `function` can't be called.

    Example:
        >>> reward = CallableReward(lambda images, prompts: [0.5] * len(prompts), name="half")
        >>> reward(torch.zeros(2, 3, 8, 8), "a cat").tolist()
        [0.5, 0.5]
    """

    def __init__(
        self, function: Callable[[Tensor, list[str]], Any], differentiable: bool = False, *, name: str | None = None
    ) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(f"`function` is a {type(function).__name__}; takes a function of pictures and prompts")
        self.function = function
        self.differentiable = differentiable
        self.name = name or getattr(function, "__name__", type(function).__name__).strip("<>")
        if isinstance(function, nn.Module):
            self.freeze()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,); see the class."""
        if self.differentiable:
            return self.function(images, prompts)
        with torch.no_grad():
            values = self.function(images.detach(), prompts)
        if isinstance(values, Tensor):
            return values.detach().to(images.device)
        if not isinstance(values, Sequence) and not hasattr(values, "__array__"):
            return values  # the check of what a reward returned names its type
        return torch.as_tensor(values, dtype=torch.float32, device=images.device)
