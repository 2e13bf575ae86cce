"""What a low-rank projection leaves of the gradients, kept for the next step: in full, in 8 or in 4 bits, or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["ERROR_FEEDBACK", "load_error", "pack_rows", "store_error", "unpack_rows"]

ERROR_FEEDBACK = (None, "full", "8bit", "4bit")


def pack_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as whole numbers between their least and greatest entry.

    Source: the buckets of MicroAdam (Modoranu et al., arXiv 2405.15593, algorithm 2), which DCT-AdamW quantizes its
    error with; here with all 2^bits levels, and exact for a constant row.

    Args:
        x: (R, C), finite.
        bits: 8 or 4.

    Returns:
        Codes, uint8, (R, C) for 8 bits and (R, ceil(C / 2)) for 4; least entries (R, 1); spacings (R, 1). An entry is
        off by half a spacing at most.
    """
    levels = 2**bits - 1
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    spacing = (high - low) / levels
    codes = ((x - low) / torch.where(spacing == 0, 1.0, spacing)).round_().clamp_(0, levels).to(torch.uint8)
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
        codes = codes[:, ::2] * 16 + codes[:, 1::2]
    return codes, low, spacing


def unpack_rows(codes: Tensor, low: Tensor, spacing: Tensor, columns: int) -> Tensor:
    """The rows (R, columns) that `pack_rows` was given, but for rounding."""
    if codes.shape[1] != columns:
        codes = torch.stack([codes // 16, codes % 16], 2).flatten(1)[:, :columns]
    return codes.to(low.dtype).mul_(spacing).add_(low)


def load_error(state: dict[str, Any], kind: str | None, like: Tensor) -> Tensor | None:
    """The error in a parameter's state, (R, C) as ``like``; None where there is none yet or none is kept."""
    if kind is None or "error" not in state:
        return None
    if kind == "full":
        return state["error"]
    return unpack_rows(state["error"], state["error_low"], state["error_spacing"], like.shape[1])


def store_error(state: dict[str, Any], kind: str, error: Tensor) -> None:
    """Puts an error (R, C) into a parameter's state."""
    if kind == "full":
        state["error"] = error
    else:
        state["error"], state["error_low"], state["error_spacing"] = pack_rows(error, 8 if kind == "8bit" else 4)
