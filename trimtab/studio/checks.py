"""Checks of what a person set, shared by the tabs' jobs."""

import math
from typing import Any

__all__ = ["LONGEST_PROMPT", "as_whole", "check_whole", "is_number", "is_whole"]

LONGEST_PROMPT = 1_000
"""Characters of a prompt."""


def is_number(value: Any, low: float, high: float) -> bool:
    """Whether a value is a finite number, not a bool, from ``low`` to ``high``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high


def is_whole(value: Any, low: int, high: int) -> bool:
    """Whether a value is an int, not a bool, from ``low`` to ``high``."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def as_whole(value: Any) -> Any:
    """A slider's number as a whole one, where it is one; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    """Refuses what is no int from ``low`` to ``high``.

    Raises:
        ValueError: in plain words, with the name.
    """
    if not is_whole(value, low, high):
        raise ValueError(f"The {name} takes a whole number from {low} to {high}.")
