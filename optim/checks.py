"""Checks of arguments that the searches and constrained solvers share."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "checked_choice",
    "checked_count",
    "checked_generator",
    "checked_number",
    "checked_point",
    "checked_scalar",
    "checked_vector",
]


def checked_number(name: str, value: Any, *, above: float | None = None, least: float | None = None) -> float:
    """A finite number in its range.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is not finite or out of range.

    Example:
        >>> checked_number("dt", 0.1, above=0)
        0.1
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` is a {type(value).__name__}; takes a number")
    low = above is not None and not value > above or least is not None and not value >= least
    if not math.isfinite(value) or low:
        bound = f" > {above:g}" if above is not None else f" >= {least:g}" if least is not None else ""
        raise ValueError(f"`{name}` is {value}; takes a finite number{bound}")
    return float(value)


def checked_count(name: str, value: Any, least: int = 1) -> int:
    """A whole number that is large enough; raises as `checked_number`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` is a {type(value).__name__}; takes an integer")
    if value < least:
        raise ValueError(f"`{name}` is {value}; takes an integer >= {least}")
    return int(value)


def checked_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of several names.

    Raises:
        ValueError: for any other.
    """
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; takes {', '.join(map(repr, choices))}")
    return value


def checked_point(name: str, value: Any) -> Tensor:
    """A finite floating tensor that is not empty, without its history.

    Raises:
        TypeError: if it is no floating tensor.
        ValueError: if it is empty or not finite.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"`{name}` is {got}; takes a floating tensor")
    if not value.numel() or not bool(torch.isfinite(value).all()):
        raise ValueError(f"`{name}` has shape {tuple(value.shape)} or values that are not finite; takes finite numbers")
    return value.detach()


def checked_generator(generator: Any) -> torch.Generator:
    """The generator given; for None one of seed 0 on the CPU.

    Raises:
        TypeError: for something else.
    """
    if generator is None:
        return torch.Generator().manual_seed(0)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"`generator` is a {type(generator).__name__}; takes a torch.Generator or None")
    return generator


def checked_scalar(name: str, value: Any) -> float:
    """What a function gave, as a number; raises ValueError if it is a tensor of several."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"`{name}` gives shape {tuple(value.shape)}; takes one that gives a single number")
    return float(value)


def checked_vector(name: str, value: Any) -> Tensor:
    """What a function gave, a tensor (p,); raises ValueError otherwise."""
    if not isinstance(value, Tensor) or value.ndim != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"`{name}` gives {got}; takes one that gives a tensor (p,)")
    return value
