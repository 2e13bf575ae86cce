"""How many bytes a computation holds at once: counted on the meta device, measured on a CPU or a GPU."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PeakBytes", "fused_attention", "measured"]


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations made inside of the block and that are still held.

    What an operation allocates and frees within itself is not seen. On the meta device nothing is computed, so the
    largest networks take the time of their operations' shapes.

    Attributes:
        live: bytes held now.
        peak: the most that were held.

    Example:
        >>> with PeakBytes() as memory:
        ...     x = torch.empty(1000, device="meta")
        ...     y = x.cos().sin()
        >>> memory.live, memory.peak  # x and y; the cosine, too, while y was made
        (8000, 12000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage(), counted=False)  # from outside, such as a weight
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage(), counted=True)
        return output

    def _hold(self, storage: torch.UntypedStorage, *, counted: bool) -> None:
        key = storage._cdata
        if key in self._held:
            return
        size = storage.nbytes() if counted else 0

        def freed(_: Any) -> None:
            self.live -= size
            self._held.pop(key, None)

        self._held[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention takes the memory of a fused kernel, also on the meta device, which would else make all scores.

    Masks are left out: their bytes are few beside the rest.
    """

    def fused(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return kernel(query, key, value, 0.0, is_causal, False, scale=scale)[0]

    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def measured(compute: Callable[[], Any], device: str, repeats: int = 3) -> dict[str, float]:
    """Peak bytes that a computation holds beyond what was there before, and its seconds.

    Args:
        compute: run once to warm up, once for its memory, and `repeats` times for its time, of which the least counts.
        device: "cuda", or "cpu", where the profiler's record of allocations is added up.
        repeats: >= 1.

    Returns:
        "bytes" and "seconds".
    """
    compute()
    gc.collect()  # what lies in cycles would be freed while it is measured
    peak = _peak_on_gpu(compute) if device.startswith("cuda") else _peak_on_cpu(compute)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        compute()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"bytes": peak, "seconds": min(times)}


def _peak_on_gpu(compute: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compute()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(compute: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        compute()
    live = peak = 0
    events = record.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
