"""Checks of what a person set, shared by the tabs' jobs."""

import math
from typing import Any

__all__ = ["LONGEST_PROMPT", "is_number", "is_whole"]

LONGEST_PROMPT = 1_000
"""Characters of a prompt."""


def is_number(value: Any, low: float, high: float) -> bool:
    """Whether a value is a finite number, not a bool, from ``low`` to ``high``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high


def is_whole(value: Any, low: int, high: int) -> bool:
    """Whether a value is an int, not a bool, from ``low`` to ``high``."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
