"""Muon's orthogonalisation for one matrix or a stack of them, and its scales."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab.optim.checks import checked_count

__all__ = ["SCALES", "fast_dtype", "newton_schulz", "step_scale"]

_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPS = 1e-7
SCALES = ("match_rms_adamw", "original", "dion", "none")


def newton_schulz(matrices: Tensor, steps: int = 5, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """About the nearest (semi-)orthogonal matrices: singular values go to between 0.7 and 1.2, zero stays zero.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), the quintic iteration. A
    single matrix gives torch.optim.Muon's numbers; torch's own function is private and takes no stacks.

    Args:
        matrices: (..., n, m).
        steps: iterations, >= 0.
        dtype: worked in, and returned. float32 is faster on processors without bfloat16 units.

    Raises:
        ValueError: for fewer dimensions than two, or negative steps.

    Example:
        >>> newton_schulz(3 * torch.eye(2), dtype=torch.float32).diagonal() > 0.6
        tensor([True, True])
    """
    if matrices.ndim < 2:
        raise ValueError(f"`matrices` has shape {tuple(matrices.shape)}; takes (..., n, m)")
    checked_count("steps", steps, least=0)
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(dtype, copy=True)
    x = (x.mT if tall else x).flatten(0, -3) if x.ndim > 3 else (x.mT if tall else x)
    norm = x.norm() if x.ndim == 2 else torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / norm.clamp(min=_EPS)
    fused = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = fused(x, fused(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    x = x.mT if tall else x
    return x.reshape(matrices.shape) if matrices.ndim > 3 else x


def step_scale(kind: str, rows: int, columns: int) -> float:
    """What an orthogonal step of a matrix (rows, columns) is multiplied by.

    "match_rms_adamw" is 0.2 sqrt(max(rows, columns)) (Moonlight, arXiv 2502.16982), so that AdamW's rates fit;
    "original" sqrt(max(1, rows / columns)); "dion" sqrt(rows / columns), a unit step in the operator norm from RMS to
    RMS; "none" 1.
    """
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if kind == "original":
        return math.sqrt(max(1.0, rows / columns))
    return math.sqrt(rows / columns) if kind == "dion" else 1.0


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, as torch.optim.Muon; float32 on a processor that would emulate it, ten times slower and more."""
    if device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32
