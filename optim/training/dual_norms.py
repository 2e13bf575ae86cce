"""Steepest directions and dual norms of the geometries that Muon-type optimizers give to kinds of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice

from .orthogonalize import newton_schulz

__all__ = ["NORM_KINDS", "dual_norm", "dual_norms"]

NORM_KINDS = ("spectral", "sign", "rms")
EXACT_UP_TO = 256
"""Shorter side up to which nuclear norms are exact; above, one orthogonalisation estimates them to about 30 %."""


def dual_norm(G: Tensor, kind: str) -> Tensor:
    """The dual norm of a gradient in the geometry of its weights.

    For weights W (d_out, d_in) or w (d):

        "spectral"  ||W|| = sqrt(d_in / d_out) ||W||_op     dual sqrt(d_out / d_in) ||G||_nuclear
        "sign"      ||W|| = the greatest entry              dual the sum of absolute entries
        "rms"       ||w|| = ||w||_2 / sqrt(d)               dual sqrt(d) ||g||_2

    Source: Hao et al., arXiv 2510.14009, the norms of its groups. A nuclear norm whose shorter side exceeds 256 is
    estimated as <G, NewtonSchulz(G)>.

    Returns:
        0-d, float32.

    Raises:
        ValueError: for another kind, or "spectral" of what is no matrix.

    Example:
        >>> dual_norm(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "spectral")
        tensor(7.)
    """
    checked_choice("kind", kind, NORM_KINDS)
    if kind == "spectral" and G.ndim != 2:
        raise ValueError(f"`G` has shape {tuple(G.shape)}; takes a matrix for the kind 'spectral'")
    return dual_norms([G.detach()], kind)[0]


def dual_norms(gradients: Sequence[Tensor], kind: str) -> list[Tensor]:
    """`dual_norm` of several; matrices of one shape together."""
    if not gradients:
        return []
    gradients = [gradient.float() for gradient in gradients]
    if kind == "sign":
        return list(torch._foreach_norm(gradients, 1))
    if kind == "rms":
        return list(torch._foreach_mul(torch._foreach_norm(gradients), [math.sqrt(g.numel()) for g in gradients]))
    norms: list[Tensor] = [torch.empty(0)] * len(gradients)
    for places in by_shape(gradients):
        stack = torch.stack([gradients[place] for place in places])
        rows, columns = stack.shape[1:]
        if min(rows, columns) <= EXACT_UP_TO:
            nuclear = torch.linalg.svdvals(stack).sum(1)
        else:
            nuclear = (stack * newton_schulz(stack, dtype=torch.float32)).sum((1, 2))
        for place, value in zip(places, nuclear * math.sqrt(rows / columns), strict=True):
            norms[place] = value
    return norms


def by_shape(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of tensors of one shape and device."""
    found: dict[tuple, list[int]] = {}
    for place, tensor in enumerate(tensors):
        found.setdefault((tensor.shape, tensor.device), []).append(place)
    return list(found.values())
