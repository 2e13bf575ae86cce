"""What a person said of pictures: likes and dislikes, or which of two is better; checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Votes", "checked_votes"]

LEAST_VOTES = 4


@dataclass(frozen=True)
class Votes:
    """Votes on pictures.

    Attributes:
        targets: (m,) float64: -1 and +1 of each picture, or 1 of each pair.
        pairs: (m, 2) int64, the preferred picture first; None for likes.
    """

    targets: Tensor
    pairs: Tensor | None


def checked_votes(features: Tensor, liked: Any, pairs: Any) -> Votes:
    """Votes on pictures with features (N, D).

    Raises:
        ValueError: neither or both kinds, another number of them, one class alone, too few, a picture preferred to
            itself, every pair also the other way round, or pictures that do not differ.
    """
    if (liked is None) == (pairs is None):
        raise ValueError("takes `liked`, a boolean for each picture, or `pairs`, and not both")
    if len(features) < 2 or bool((features - features[0]).abs().max() < 1e-6):
        raise ValueError("`pictures` are all the same: there is nothing to tell apart")
    if pairs is None:
        return _likes(features, liked)
    rows = torch.as_tensor(pairs)
    if rows.ndim != 2 or rows.shape[1] != 2 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(f"`pairs` is {rows.dtype} {tuple(rows.shape)}; takes integers (m, 2), the preferred first")
    _enough(len(rows), "pairs")
    if int(rows.min()) < 0 or int(rows.max()) >= len(features):
        raise ValueError(
            f"`pairs` names pictures {int(rows.min())} to {int(rows.max())}; takes 0 to {len(features) - 1}"
        )
    if bool((rows[:, 0] == rows[:, 1]).any()):
        raise ValueError("`pairs` has a picture preferred to itself")
    rows = rows.long().to(features.device)
    difference = features[rows[:, 0]] - features[rows[:, 1]]
    if bool((difference.abs().amax(1) < 1e-6).all()):
        raise ValueError("`pairs` compares duplicates only: the two pictures of each have the same features")
    said = {tuple(row) for row in rows.tolist()}
    if all((b, a) in said for a, b in said):
        raise ValueError("`pairs` has every pair both ways round: they say nothing")
    return Votes(torch.ones(len(rows), dtype=torch.float64, device=features.device), rows)


def _likes(features: Tensor, liked: Any) -> Votes:
    values = torch.as_tensor(liked)
    if values.shape != features.shape[:1] or values.dtype != torch.bool:
        raise ValueError(f"`liked` is {values.dtype} {tuple(values.shape)}; takes {len(features)} booleans")
    _enough(len(values), "liked")
    count = int(values.sum())
    if count in (0, len(values)):
        kinds = ("dislikes", "likes") if count == 0 else ("likes", "dislikes")
        raise ValueError(f"`liked` has {len(values)} {kinds[0]} and no {kinds[1]}; takes both")
    mean = features[values].mean(0), features[~values].mean(0)
    if bool((mean[0] - mean[1]).abs().max() < 1e-6) and len(torch.unique(features.round(decimals=5), dim=0)) < 3:
        raise ValueError("`liked` contradicts itself: the same picture is liked and disliked as often")
    return Votes((2 * values.double() - 1).to(features.device), None)


def _enough(count: int, name: str) -> None:
    if count < LEAST_VOTES:
        raise ValueError(f"`{name}` has {count} votes; takes at least {LEAST_VOTES}")
