"""Parts of a computation on a CPU side by side, each in a thread that does its torch operations alone.

torch's own threads share the work of one operation and then spin for the next, which takes the core from other threads
that sort in the meantime. A few large parts, each on one core from beginning to end, use the cores twice as well here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

__all__ = ["in_threads", "num_parts"]

SMALL = 1 << 14
"""Elements below which a thread costs more than it saves."""

Result = TypeVar("Result")
_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()
_here = threading.local()


def _forget_pool() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # a forked process has none of the threads


def num_parts(rows: int, elements: int) -> int:
    """In how many parts to cut ``rows`` rows of ``elements`` elements in all: torch's threads, 1 inside a part."""
    if getattr(_here, "inside", False):
        return 1
    return max(1, min(torch.get_num_threads(), rows, elements // SMALL))


def in_threads(task: Callable[..., Result], parts: Sequence[tuple[Any, ...]]) -> list[Result]:
    """``[task(*part) for part in parts]``, side by side, without gradients being recorded.

    Args:
        task: what to do; under inference mode where the caller is.
        parts: its arguments. A single part runs in the calling thread.

    Raises:
        Exception: what a task raised, the first of them.
    """
    if len(parts) == 1:
        with torch.no_grad():
            return [task(*parts[0])]
    inference = torch.is_inference_mode_enabled()

    def run(part: tuple[Any, ...]) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return task(*part)

    return list(_threads().map(run, parts))


def _threads() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            count, threads = os.cpu_count() or 1, torch.get_num_threads()
            started = threading.Barrier(count + 1)
            _pool = ThreadPoolExecutor(count, "trimtab-geometry", _alone)
            for _ in range(count):
                _pool.submit(started.wait)
            started.wait()
            torch.set_num_threads(threads)  # the workers' own setting was also that of threads to come
        return _pool


def _alone() -> None:
    _here.inside = True
    torch.get_num_threads()  # torch gives a thread the general setting when it is first asked for
    torch.set_num_threads(1)
