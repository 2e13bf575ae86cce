"""Rewards scaled by how new the direction of an answer's gradient is within its group: G2RL."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_number

from .advantages import group_advantages, group_index

__all__ = ["ShapedRewards", "exploration_score", "gradient_guided_advantages", "gradient_guided_rewards"]

REFERENCES = ("reward", "uniform", "success")
TRANSFORMS = ("identity", "minmax", "signed")
SMALL = 1e-8


@dataclass(frozen=True)
class ShapedRewards:
    """Rewards after shaping.

    Attributes:
        rewards: (B,) float32.
        score: (B,), the exploration scores nu in [0, 1].
        similarity_mean: mean cosine of the features within groups.
        opposing_fraction: share of the pairs within groups whose cosine is negative.
    """

    rewards: Tensor
    score: Tensor
    similarity_mean: float
    opposing_fraction: float


@torch.no_grad()
def exploration_score(
    features: Tensor,
    rewards: Tensor,
    groups: Tensor | Sequence[int],
    *,
    reference: str = "reward",
    temperature: float = 1.0,
    root: bool = True,
    signed: bool = False,
    allow_singletons: bool = False,
) -> Tensor:
    """How much of each answer's update direction the others of its group, the better the more, do not explain.

        S_ij = cosine of Phi_i and Phi_j,    w_ij = exp(r_j) / sum_{k != i} exp(r_k),  j != i
        nu_i = sqrt(max(0, 1 - sum_{j != i} w_ij S_ij^2))   in [0, 1]

    Source: Liang et al., "Can LLMs Guide Their Own Exploration? Gradient-Guided Reinforcement Learning for LLM
    Reasoning", arXiv 2512.15687, equations (9) to (11). Whether (11) has the root can't be told from the text that was
    at hand; `root=False` leaves it out.

    Args:
        features: (B, F), finite; `token_sensitivity` and `LastLayerFeature` make them.
        rewards: (B,), finite.
        groups: (B,), a number for each group.
        reference: "reward" as above; "uniform": all others alike; "success": those of positive reward alike, all
            where there are none.
        temperature: divides the rewards in w, > 0.
        root: see above.
        signed: opposing directions count as new: max(S, 0)^2 in place of S^2.
        allow_singletons: a group of one has nu = 1 instead of an error.

    Returns:
        (B,) float32. An answer without a gradient (||Phi|| < 1e-8) has 0, and is no reference.

    Raises:
        ValueError: shapes that don't fit, values that are not finite, a group of one.

    Example:
        >>> e = torch.eye(2)
        >>> exploration_score(e[[0, 0, 1]], torch.zeros(3), [5, 5, 5], reference="uniform").tolist()
        [0.7071067690849304, 0.7071067690849304, 1.0]
    """
    checked_choice("reference", reference, REFERENCES)
    checked_number("temperature", temperature, above=0)
    features, rewards, index, counts = _checked(features, rewards, groups)
    if int(counts.min()) < 2 and not allow_singletons:
        raise ValueError("`groups` has a group of one; takes groups of two and more, or allow_singletons=True")
    cosines, known = _cosines(features)
    pairs = (
        (index[:, None] == index[None]) & known[None] & ~torch.eye(len(index), dtype=torch.bool, device=index.device)
    )
    logits = {"reward": rewards / temperature, "uniform": torch.zeros_like(rewards)}.get(reference)
    if logits is None:
        succeeded = pairs & (rewards > 0)[None]
        pairs = torch.where(succeeded.any(1, keepdim=True), succeeded, pairs)
        logits = torch.zeros_like(rewards)
    weights = torch.where(pairs, logits[None], -torch.inf).softmax(1).nan_to_num(0.0)  # rows without references: 0
    explained = (weights * (cosines.clamp(min=0) if signed else cosines).square()).sum(1)
    score = (1 - explained).clamp(0, 1)
    score = torch.where(known, score.sqrt() if root else score, 0.0)
    return score.float()


@torch.no_grad()
def gradient_guided_rewards(
    rewards: Tensor,
    features: Tensor,
    groups: Tensor | Sequence[int],
    *,
    strength: float = 1.0,
    clip: float = 3.0,
    transform: str = "identity",
    coupled: bool = False,
    center: bool = False,
    **options: object,
) -> ShapedRewards:
    """Rewards times a bounded factor of their exploration scores.

        r~_i = clip(r_i (1 + strength nu_i'), -clip, clip)

    where nu' is a bounded monotone transform of nu: itself, scaled to [0, 1] within the group ("minmax") or to
    [-1, 1] ("signed"). For rewards of -1 and 1, a right answer in a new direction gains; a wrong one far from the
    right ones costs more, and with "signed" one near them costs less, as the paper's text has it.

    Source: arXiv 2512.15687, equations (12) and (13) and section 2.5 (clip 3). Equation (12) as printed has
    1 + lambda r nu', which for r = -1 makes novelty a bonus on wrong answers, against the text below it:
    `coupled=True` takes it literally.

    Args:
        rewards: (B,), finite, about within [-1, 1].
        features: (B, F).
        groups: (B,).
        strength: lambda >= 0.
        clip: > 0.
        transform: "identity", "minmax" or "signed".
        coupled: see above.
        center: rewards less their group's mean, divided by the largest distance from it: for continuous rewards.
        options: of `exploration_score`.

    Returns:
        Rewards and scores.

    Raises:
        ValueError: a number out of range, and as `exploration_score`.

    Warns:
        UserWarning: where rewards other than +-1 have one sign throughout a group: the factor is a bonus for novelty
            alone there.
    """
    checked_number("strength", strength, least=0)
    checked_number("clip", clip, above=0)
    checked_choice("transform", transform, TRANSFORMS)
    features, rewards, index, counts = _checked(features, rewards, groups)
    if center:
        rewards = group_advantages(rewards, groups)
        rewards = rewards / _per_group(rewards.abs(), index, "amax", 0.0).clamp(min=SMALL)
    elif bool(((_per_group(rewards, index, "amin", torch.inf) > 0) & (rewards != 1)).any()):
        warnings.warn("`rewards` of a group are all positive: shaping rewards novelty alone; center=True", stacklevel=2)
    score = exploration_score(features, rewards, groups, **options)
    factor = score
    if transform != "identity":
        low, high = _per_group(score, index, "amin", torch.inf), _per_group(score, index, "amax", -torch.inf)
        factor = torch.where(high > low, (score - low) / (high - low).clamp(min=SMALL), 0.0 * score)
        factor = torch.where(high > low, 2 * factor - 1, factor) if transform == "signed" else factor
    shaped = rewards * (1 + strength * factor * (rewards if coupled else 1))
    cosines, _ = _cosines(features)
    pairs = (index[:, None] == index[None]).triu(1)
    among = cosines[pairs] if bool(pairs.any()) else torch.zeros(1)
    return ShapedRewards(
        shaped.clamp(-clip, clip).float(), score, float(among.mean()), float((among < 0).float().mean())
    )


@torch.no_grad()
def gradient_guided_advantages(
    rewards: Tensor,
    features: Tensor,
    groups: Tensor | Sequence[int],
    *,
    strength: float = 1.0,
    clip: float = 3.0,
    normalize: str = "std",
    eps: float = 1e-4,
    **options: object,
) -> Tensor:
    """Group-relative advantages of gradient-guided rewards.

    "std" is the paper's: (r~ - mean) / (std + eps), GRPO of r~. Where all rewards of a group are equal the division
    takes `strength` away again and the bounded factor becomes an unbounded one; "none" leaves the division out, and
    "advantage" scales the plain advantages, A_i (1 + strength nu_i).

    Args:
        rewards: (B,), finite.
        features: (B, F).
        groups: (B,).
        strength: lambda >= 0; 0 gives `group_advantages` of the rewards to the bit.
        clip: of the shaped rewards, > 0.
        normalize: "std", "none" or "advantage".
        eps: added to the deviation.
        options: of `gradient_guided_rewards` and `exploration_score`.

    Returns:
        (B,) float32.

    Raises:
        ValueError: as `gradient_guided_rewards`.
    """
    checked_choice("normalize", normalize, ("std", "none", "advantage"))
    if normalize == "advantage":
        checked_number("strength", strength, least=0)
        score = exploration_score(features, rewards, groups, **options)
        return group_advantages(rewards.float(), groups, std=True, eps=eps) * (1 + strength * score)
    shaped = gradient_guided_rewards(rewards, features, groups, strength=strength, clip=clip, **options)
    return group_advantages(shaped.rewards, groups, std=normalize == "std", eps=eps)


def _checked(
    features: Tensor, rewards: Tensor, groups: Tensor | Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if features.ndim != 2 or rewards.shape != features.shape[:1] or not len(rewards):
        raise ValueError(
            f"`features` has shape {tuple(features.shape)} and `rewards` {tuple(rewards.shape)}; takes (B, F), (B,)"
        )
    for row in range(len(features)):
        if not bool(torch.isfinite(features[row]).all()):
            raise ValueError(f"`features` has values in row {row} that are not finite; takes finite ones")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("`rewards` has values that are not finite; takes finite ones")
    index, counts = group_index(groups, len(rewards))
    precise = torch.promote_types(features.dtype, torch.float32)
    return features.to(precise), rewards.detach().to(precise), index.to(features.device), counts


def _cosines(features: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of all pairs, 0 with a feature of length 0, and which features have a length."""
    norms = features.norm(dim=1)
    known = norms >= SMALL
    units = torch.where(known[:, None], features / norms.clamp(min=SMALL)[:, None], 0.0)
    return (units @ units.T).clamp(-1, 1), known


def _per_group(values: Tensor, index: Tensor, reduce: str, start: float) -> Tensor:
    """Each row's extreme within its group."""
    found = values.new_full((int(index.max()) + 1,), start)
    return found.scatter_reduce(0, index, values, reduce)[index]
