"""What a reward is: a frozen function of pictures and prompts whose values are higher for better pictures."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["RewardModel", "Tokenize", "checked_prompts"]


class RewardModel(nn.Module):
    """Base of all rewards: `reward(images, prompts)` is one number a picture, higher is better.

    A subclass implements `score`, or `terms` and `combine` where the value is made of several, and calls `freeze`
    at the end of its constructor. A reward is always in evaluation mode and none of its parameters needs a gradient;
    gradients flow to the pictures.

    Attributes:
        name: what its values are called in reports.
        differentiable: whether values have a gradient with respect to the pictures.

    Example:
        >>> class Brightness(RewardModel):
        ...     name = "brightness"
        ...     def score(self, images, prompts):
        ...         return images.mean((1, 2, 3))
        >>> Brightness()(torch.full((2, 3, 4, 4), 0.25), "anything").tolist()
        [0.25, 0.25]
    """

    name: str = "reward"
    differentiable: bool = True

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Values of pictures (B, 3, H, W) with one prompt each: (B,), any floating dtype."""
        raise NotImplementedError(f"{type(self).__name__} has no `score`")

    def terms(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """The parts that the value is made of, by name, each (B,)."""
        return {self.name: self.score(images, prompts)}

    def combine(self, terms: dict[str, Tensor]) -> Tensor:
        """The value (B,) of parts (B,): here the only one."""
        (value,) = terms.values()
        return value

    @overload
    def forward(self, images: Tensor, prompts: str | Sequence[str], return_terms: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(
        self, images: Tensor, prompts: str | Sequence[str], return_terms: Literal[True]
    ) -> tuple[Tensor, dict[str, Tensor]]: ...
    def forward(
        self, images: Tensor, prompts: str | Sequence[str], return_terms: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Scores pictures.

        Args:
            images: (B, 3, H, W), RGB in [0, 1], floating, on the reward's device.
            prompts: one for all pictures or one for each.
            return_terms: also return the parts that the values are made of.

        Returns:
            (B,) float32; with `return_terms` also the parts by name, each (B,) float32 and detached.

        Raises:
            ValueError: for pictures of another shape, another number of prompts, or a reward that returns
                another shape than (B,).
            TypeError: for pictures that are no floating tensor or prompts that are no strings.
        """
        terms = self.checked_terms(images, prompts)
        value = self.combine(terms)
        if return_terms:
            return value, {name: term.detach() for name, term in terms.items()}
        return value

    def checked_terms(self, images: Tensor, prompts: str | Sequence[str]) -> dict[str, Tensor]:
        """The parts by name, each (B,) float32 with its gradient; arguments and errors are those of a call."""
        texts = checked_prompts(images, prompts)
        return {name: self._checked(name, value, len(images)) for name, value in self.terms(images, texts).items()}

    def freeze(self, gradient_checkpointing: bool = True) -> None:
        """Ends every parameter's need for a gradient, for good, and has the layers' activations computed twice.

        Args:
            gradient_checkpointing: layers of transformers' models keep their inputs only and are computed again in
                the backward pass.
        """
        self.requires_grad_(False)
        super().train(False)
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = gradient_checkpointing
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            if _is_layer(module):
                # A layer asks for this flag before it checkpoints. Its parts stay in evaluation mode: no dropout.
                module.training = gradient_checkpointing

    def train(self, mode: bool = True) -> RewardModel:
        """Puts all but checkpointed layers in evaluation mode, whatever `mode`: a reward is never trained here."""
        checkpointed = [module for module in self.modules() if _is_layer(module) and module.training]
        super().train(False)
        for module in checkpointed:
            module.training = True
        return self

    @staticmethod
    def _checked(name: str, value: Any, batch: int) -> Tensor:
        if not isinstance(value, Tensor) or tuple(value.shape) != (batch,):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"reward {name!r} returned {got}; takes a tensor of shape ({batch},), one value a picture")
        return value.float()


def _is_layer(module: nn.Module) -> bool:
    return any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)


def checked_prompts(images: Any, prompts: Any) -> list[str]:
    """The prompts of pictures, one each.

    Raises:
        ValueError: for pictures of another shape than (B, 3, H, W) or another number of prompts.
        TypeError: for pictures that are no floating tensor or prompts that are no strings.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"`images` is {got}; takes a floating tensor (B, 3, H, W) in [0, 1]")
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"`images` has shape {tuple(images.shape)}; takes (B, 3, H, W) with B >= 1")
    if isinstance(prompts, str):
        return [prompts] * len(images)
    if not isinstance(prompts, Sequence) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"`prompts` is {prompts!r}; takes a string or a list of strings")
    if len(prompts) != len(images):
        raise ValueError(f"`prompts` has {len(prompts)} strings; takes one, or {len(images)} for as many pictures")
    return list(prompts)


class Tokenize:
    """A tokenizer that cuts prompts to what a model takes and says so, once.

    Args:
        tokenizer: of transformers.
        max_length: tokens that the model takes.
        padding: as transformers' `padding`.
        attention_mask: whether the model gets the mask too.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, *, padding: str | bool = True, attention_mask: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.padding = padding
        self.attention_mask = attention_mask
        self._warned = False

    def __call__(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """Tokens of prompts as keyword arguments of a text model: (B, tokens), int64."""
        options = {"truncation": True, "max_length": self.max_length, "padding": self.padding, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **options)
        # Only a text that fills all places can have lost some.
        full = [text for text, row in zip(prompts, tokens["attention_mask"], strict=True) if bool(row.all())]
        if not self._warned and len(tokens["input_ids"][0]) == self.max_length:
            longest = max((len(self.tokenizer(text, verbose=False)["input_ids"]) for text in full), default=0)
            if longest > self.max_length:
                self._warned = True
                message = f"a prompt has {longest} tokens and the reward takes {self.max_length}: its end is cut off"
                warnings.warn(message, UserWarning, stacklevel=2)
        names = ("input_ids", "attention_mask") if self.attention_mask else ("input_ids",)
        return {name: tokens[name].to(device) for name in names}


def model_max_length(tokenizer: Any, positions: int) -> int:
    """The smaller of what a tokenizer and a model's positions take; some tokenizers state no limit."""
    stated = getattr(tokenizer, "model_max_length", math.inf)
    return int(min(stated, positions))
