"""ZeroGPU: a card is lent for each run, for as long as its job says; elsewhere nothing happens.

There the decorated function runs in a process that is forked from this one, so the model is loaded here, before the
first run: what a fork loads is lost with it. Its arguments and what it yields are pickled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["on_gpu", "on_zero_gpu", "seconds_of"]

_LEAST, _MOST = 10, 120
_MARGIN = 4
"""Seconds before the card is taken back, in which a run may end by itself with what it has."""


def on_zero_gpu() -> bool:
    """Whether this is a Space with ZeroGPU."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def seconds_of(job: Any, *_: Any) -> int:
    """Seconds that a job asks for: its estimate with a margin, 10 to 120."""
    return int(min(_MOST, max(_LEAST, 1.5 * job.seconds() + 5)))


def on_gpu(stream: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Wraps the streaming of a job in ``spaces.GPU`` on ZeroGPU; gives the function itself elsewhere.

    Args:
        stream: a generator that takes a job, the wish to stop, the longest run in seconds, and whatever else. On
            ZeroGPU it is told to end a little before the card is taken back, so that its last result still comes.
    """
    if not on_zero_gpu():
        return stream
    import spaces

    lent = spaces.GPU(duration=seconds_of)(stream)

    def lent_stream(job: Any, stop: Any, longest: float, *others: Any) -> Iterator[Any]:
        yield from lent(job, stop, min(longest, seconds_of(job) - _MARGIN), *others)

    return lent_stream
