"""The regularization of a linear reward head and the trust in each of its votes, tuned for votes held out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from trimtab.optim.checks import checked_count, checked_number
from trimtab.optim.constrained import LVHBA, BilevelProblem
from trimtab.optim.solvers import LinearHead, fit_linear_head, fit_preference_head

from .personal import FeatureSpace, PersonalReward, _features_of
from .personal_votes import Votes, checked_votes

__all__ = ["TunedHead", "tune_head", "tune_personal_reward"]

DECAYS = 1e-4, 10.0
"""Where the regularization is looked for."""


@dataclass(frozen=True)
class TunedHead:
    """What `tune_head` found.

    Attributes:
        head: fitted to all votes at their trust and the decay found.
        trust: (m,) float64 in [0, 1], of each vote; 1 of those held out.
        decay: l2 beside the mean loss of trusted votes.
        held_out_loss: mean loss of the held-out votes under what the others train at their trust and this decay.
        untuned_loss: under what the others train at full trust and the decay at the start.
    """

    head: LinearHead
    trust: Tensor
    decay: float
    held_out_loss: float
    untuned_loss: float


def tune_head(
    x: Tensor,
    votes: Votes,
    held_out: Tensor,
    *,
    decay: float = 1e-2,
    steps: int = 800,
    callback: Callable[[LVHBA], bool | None] | None = None,
) -> TunedHead:
    """min over (c, l) of the held-out votes' mean loss under the head that the m others train at trust c,

        argmin_w (1/m) sum_k c_k softplus(-m_k(w)) + l / 2 ||w||^2,    c in [0, 1]^m,

    with m_k(w) the margin of vote k: both levels in one loop of gradient steps, `LVHBA`. Votes that contradict what
    the held-out ones say lose their trust. Those may be few, but must be right: with as many wrong ones among them as
    among the others the result is worse than an untuned head.

    Source: the data hyper-cleaning of Yao, Yu, Zeng, Zhang (arXiv 2401.16164), section 4; the losses here are convex in
    w, as its guarantee asks. c is scaled by the root of m, and l by its logarithm, so that one step serves all.

    Args:
        x: (N, d) floating, the head's inputs.
        votes: on its rows.
        held_out: boolean, one a vote; at least one true and one false.
        decay: l at the start, > 0.
        steps: of the loop.
        callback: called with the loop after each step; a true value ends it.

    Raises:
        ValueError: a number out of range, or `held_out` of another shape.
        RuntimeError: if the loop diverges.
    """
    checked_count("steps", steps)
    shape = votes.targets.shape
    if held_out.shape != shape or held_out.dtype != torch.bool or held_out.all() or not held_out.any():
        raise ValueError(
            f"`held_out` is {held_out.dtype} {tuple(held_out.shape)}, {int(held_out.sum())} of them true; takes "
            f"booleans {tuple(shape)}, some true and some false"
        )
    low, high = DECAYS
    start = min(max(checked_number("decay", decay, above=0), low), high)
    x, held_out = x.detach().double(), held_out.to(x.device)
    rows = _margins(x, votes)
    ours, theirs = rows[~held_out], rows[held_out]
    m, scale, bias = len(ours), math.sqrt(len(ours)), votes.pairs is None

    def split(point: Tensor) -> tuple[Tensor, Tensor]:
        return scale * point[:m], point[m].exp()

    def lower(point: Tensor, w: Tensor) -> Tensor:
        trust, l2 = split(point)
        penalized = w[:-1] if bias else w
        return trust @ softplus(-(ours @ w)) / m + l2 / 2 * penalized.square().sum()

    def project(point: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logs = point[m:].clamp(math.log(low), math.log(high))
        return torch.cat([point[:m].clamp(0, 1 / scale), logs]), w

    def loss(w: Tensor) -> Tensor:
        return softplus(-(theirs @ w)).mean()

    before = _flat(_fit(x, votes, start, (~held_out).double()))
    point = torch.cat([x.new_full((m,), 1 / scale), x.new_tensor([math.log(start)])])
    problem = BilevelProblem(lambda _, w: loss(w), lower, project_xy=project)
    loop = LVHBA(problem, point, before, alpha=0.1, beta=0.1, eta=0.2, gamma1=1.0, gamma2=1.0, c0=0.1)
    for _ in range(steps):
        loop.step()
        if callback is not None and callback(loop):
            break
    trust, l2 = split(loop.x)
    found = float(l2) * m / float(trust.sum().clamp_min(1e-9))
    alone, everything = torch.zeros(shape).to(x), torch.ones(shape).to(x)
    alone[~held_out] = everything[~held_out] = trust.clamp(0, 1)
    after = _flat(_fit(x, votes, found, alone))
    return TunedHead(_fit(x, votes, found, everything), everything, found, float(loss(after)), float(loss(before)))


def tune_personal_reward(
    reward: PersonalReward,
    pictures: Tensor,
    *,
    held_out: Sequence[int] | Tensor,
    liked: Sequence[bool] | Tensor | None = None,
    pairs: Sequence[tuple[int, int]] | Tensor | None = None,
    decay: float = 1e-2,
    steps: int = 800,
) -> tuple[PersonalReward, TunedHead]:
    """A taste with a linear head whose decay, and whose trust in each vote, serve the votes that are surely right.

    Args:
        reward: from `fit_personal_reward`, whose features and their directions are kept.
        pictures: (N, 3, H, W) in [0, 1] or features (N, D), as there.
        held_out: numbers of the votes that are right, at least four and four fewer than all.
        liked: as there.
        pairs: as there.
        decay: where l2 starts, > 0.
        steps: of the loop.

    Returns:
        The reward, and what `tune_head` found.

    Raises:
        ValueError: votes that `fit_personal_reward` refuses, or `held_out` that names others or too few.
    """
    features = _features_of(reward.clip, pictures)
    votes = checked_votes(features, liked, pairs)
    count, chosen = len(votes.targets), torch.as_tensor(held_out).flatten()
    if chosen.is_floating_point() or chosen.dtype == torch.bool or len(chosen.unique()) < len(chosen):
        raise ValueError(f"`held_out` is {chosen.dtype} {tuple(chosen.shape)}; takes numbers of votes, each once")
    if not 4 <= len(chosen) <= count - 4 or int(chosen.min()) < 0 or int(chosen.max()) >= count:
        raise ValueError(f"`held_out` names {len(chosen)} votes; takes 4 to {count - 4} of 0 to {count - 1}")
    right = torch.zeros(count, dtype=torch.bool)
    right[chosen] = True
    space = FeatureSpace(reward.mean, reward.basis, reward.scale)
    found = tune_head(space(features.to(reward.mean)), votes, right, decay=decay, steps=steps)
    head = copy.deepcopy(found.head).float()
    return PersonalReward(reward.clip, space, head, source=reward.source, name=reward.name), found


def _fit(x: Tensor, votes: Votes, l2: float, trust: Tensor) -> LinearHead:
    """The linear head of likes, or of pairs, at some trust in each."""
    if votes.pairs is None:
        return fit_linear_head(x, votes.targets > 0, l2=l2, weights=trust)
    return fit_preference_head(x[votes.pairs[:, 0]], x[votes.pairs[:, 1]], l2=l2, weights=trust)


def _margins(x: Tensor, votes: Votes) -> Tensor:
    """Rows a_k (m, d) with margin m_k(w) = <a_k, w>; for likes (m, d + 1), of which the last entry is the intercept."""
    if votes.pairs is not None:
        return x[votes.pairs[:, 0]] - x[votes.pairs[:, 1]]
    return votes.targets[:, None] * pad(x, (0, 1), value=1.0)


def _flat(head: LinearHead) -> Tensor:
    weight = head.weight.detach()[0]
    return weight if head.bias is None else torch.cat([weight, head.bias.detach()])
