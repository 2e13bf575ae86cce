"""What the searches share: noise, the evaluation of many points, and what a search returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SearchResult", "evaluate", "normal_like"]


@dataclass(frozen=True)
class SearchResult:
    """What a search by values found.

    Attributes:
        x: the best point among those evaluated, shaped as one point. With an objective that changes from step to
            step, whose values can't be compared, the last consensus.
        value: its energy.
        consensus: the last consensus point; it need not have been evaluated.
        history: one dict a step, of plain numbers.
        num_evaluations: points whose energy was computed.
        stop_reason: why the search ended.
    """

    x: Tensor
    value: float
    consensus: Tensor
    history: tuple[dict[str, Any], ...]
    num_evaluations: int
    stop_reason: str


def normal_like(x: Tensor, generator: torch.Generator, shape: tuple[int, ...] | None = None) -> Tensor:
    """Standard normal numbers of a tensor's dtype and device, shaped as it or as told.

    They are drawn on the generator's device, at least in float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = tuple(x.shape) if shape is None else shape
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).to(x.device, x.dtype)


@torch.no_grad()
def evaluate(fn: Callable[..., Tensor], x: Tensor, chunk: int | None, *arguments: Any) -> Tensor:
    """Energies of points, a chunk at a time.

    Args:
        fn: (n, *shape), and the further arguments, to (n,).
        x: (N, *shape).
        chunk: points at once; None is all.
        arguments: what else `fn` takes.

    Returns:
        (N,) float64 on the CPU.

    Raises:
        ValueError: if `fn` gives another shape than (n,).
    """
    parts = []
    for block in x.split(chunk or len(x)):
        values = fn(block, *arguments)
        if not isinstance(values, Tensor) or tuple(values.shape) != (len(block),):
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise ValueError(f"`fn` gives {got}; takes one that gives ({len(block)},), one energy a point")
        parts.append(values.detach().double().cpu())
    return torch.cat(parts)
