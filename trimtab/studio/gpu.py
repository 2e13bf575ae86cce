"""ZeroGPU: a card is lent for each run, for as long as its job says; elsewhere nothing happens."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

__all__ = ["on_gpu", "on_zero_gpu"]


def on_zero_gpu() -> bool:
    """Whether this is a Space with ZeroGPU."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def seconds_of(job: Any, *_: Any) -> int:
    """Seconds that a job asks for: its estimate with a margin, 10 to 120."""
    return int(min(120, max(10, 1.5 * job.seconds() + 5)))


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the streaming of a job in ``spaces.GPU`` on ZeroGPU; gives the function itself elsewhere."""
    if not on_zero_gpu():
        return function
    import spaces

    return spaces.GPU(duration=seconds_of)(function)
