"""One policy-gradient loss with four exchangeable parts, of which the known post-training losses are settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_number

__all__ = ["UnifiedLoss", "stability_mask", "unified_policy_loss"]

KINDS = ("none", "ppo", "sequence", "detached")
REDUCTIONS = ("mean", "sequence", "constant", "sum")
LIMIT = 20.0  # of log-ratios, so that their exp stays finite in float32


@dataclass(frozen=True)
class UnifiedLoss:
    """A loss and what it did.

    Attributes:
        loss: scalar with a graph; its gradient is minus the estimate.
        per_sample: (B,) with a graph; `loss` is their mean, for the reduction "sum" their sum.
        ratio: pi / pi_ref of each sample or token, without history; of whole samples, (B, 1), for "sequence".
        stable_fraction: share of the terms that the stabilization mask lets through.
        kl: estimate of KL(pi || pi_ref) from samples of pi_ref: mean of pi/pi_ref log(pi/pi_ref) - (pi/pi_ref - 1).
    """

    loss: Tensor
    per_sample: Tensor
    ratio: Tensor
    stable_fraction: float
    kl: float


def stability_mask(
    log_ratio: Tensor, advantages: Tensor, *, kind: str = "none", clip: float = 0.2, clip_high: float | None = None
) -> Tensor:
    """The stabilization mask 1_stable: where a term keeps its gradient.

    "ppo" drops a term whose ratio is past the clip on the side to which its advantage pushes:
    not (A > 0 and ratio > 1 + clip_high) and not (A < 0 and ratio < 1 - clip), which is where
    min(ratio A, clip(ratio) A) has a gradient. "sequence" is the same for ratios of whole sequences.
    "none" and "detached" (whose weights are clipped, not their gradients) keep all.

    Args:
        log_ratio: log pi - log pi_ref, any shape.
        advantages: a shape that broadcasts with it.
        kind: "none", "ppo", "sequence" or "detached".
        clip: the clip range below 1, in [0, 1).
        clip_high: above 1, >= 0; None is `clip`.

    Returns:
        bool, of the broadcast shape.

    Raises:
        ValueError: another kind or range.
    """
    checked_choice("kind", kind, KINDS)
    low, high = _range(clip, clip_high)
    log_ratio, advantages = torch.broadcast_tensors(log_ratio.detach(), advantages.detach())
    if kind in ("none", "detached"):
        return torch.ones_like(log_ratio, dtype=torch.bool)
    ratio = log_ratio.clamp(-LIMIT, LIMIT).exp()
    return ~((advantages > 0) & (ratio > high) | (advantages < 0) & (ratio < low))


def unified_policy_loss(
    log_probs: Tensor,
    advantages: Tensor,
    *,
    ref_log_probs: Tensor | Literal["current", "one"] = "current",
    mask: Tensor | None = None,
    stability: str = "none",
    clip: float = 0.2,
    clip_high: float | None = None,
    reshape: Callable[[Tensor], Tensor] | None = None,
    reduction: str = "mean",
    constant: float | None = None,
) -> UnifiedLoss:
    """The unified policy-gradient estimator as a loss.

        grad = 1_stable * (1 / pi_ref) * A * grad pi        L = -mean(1_stable A exp(log pi - log pi_ref))

    | method | `ref_log_probs` | `stability` | advantages | `reduction` |
    |---|---|---|---|---|
    | SFT | "current" | "none" | 1 | "mean" |
    | REINFORCE | "current" | "none" | reward - baseline | "sequence" of (B,) or "sum" |
    | PPO | old policy's | "ppo" | any, such as GAE | "mean" |
    | GRPO | old policy's | "ppo" | `group_advantages(std=True)` | "sequence" |
    | Dr. GRPO | old policy's | "ppo" or "none" | `group_advantages` | "constant" |
    | GSPO | old policy's | "sequence" | `group_advantages(std=True)` | "sequence" |
    | CISPO | old policy's | "detached" | `group_advantages(std=True)` | "mean" |
    | LUFFY, off-policy part | "one" | "none", `reshape=lambda p: p / (p + 0.1)` | group-relative | any |

    The paper's hybrid is `hybrid_loss` of two of these. Of a policy with densities over many coordinates, summed
    log-probabilities leave every clip range in one step: take their mean per coordinate
    (`gaussian_log_prob(reduce="mean")`) or one update per rollout with "none".

    Source: Lv et al., "Towards a Unified View of Large Language Model Post-Training", arXiv 2509.04419, their unified
    policy gradient estimator.

    Args:
        log_probs: (B,) or (B, K) with a graph to the policy; computed on in float32 at the least.
        advantages: (B,) or (B, K), constants.
        ref_log_probs: the reference policy's, of the shape of `log_probs`, without a graph; "current" has ratios 1;
            "one" has pi_ref = 1, so that the weight is pi itself: for discrete policies.
        mask: (B, K) bool or 0/1, the tokens that count; None is all. Each sample needs one at least.
        stability: "none"; "ppo"; "sequence": ratios of whole sequences, exp(mean_k log-ratio), clipped as PPO's;
            "detached": weights clip(ratio) without a gradient, times grad log pi.
        clip: see `stability_mask`.
        clip_high: likewise.
        reshape: applied to the ratio; differentiable. Not with "detached".
        reduction: "mean" over all tokens; "sequence": over the tokens of a sample, then over samples; "constant": sum
            over tokens divided by `constant`, mean over samples; "sum".
        constant: > 0, such as the longest length.

    Returns:
        Loss and statistics.

    Raises:
        ValueError: shapes that don't fit, an empty batch, a reference with a graph, "one" with positive
            log-probabilities, a sample without tokens, another name.

    Example:
        >>> logits = torch.zeros(2, requires_grad=True)
        >>> found = unified_policy_loss(logits.log_softmax(0)[[0]], torch.ones(1))  # SFT on action 0
        >>> found.loss.backward()
        >>> logits.grad.tolist()
        [-0.5, 0.5]
    """
    checked_choice("stability", stability, KINDS)
    checked_choice("reduction", reduction, REDUCTIONS)
    low, high = _range(clip, clip_high)
    log_probs, advantages, valid = _shaped(log_probs, advantages, mask)
    log_ratio = (log_probs - _reference(log_probs, ref_log_probs, valid)).clamp(-LIMIT, LIMIT)
    if stability == "sequence":
        counts = valid.sum(1, keepdim=True)
        log_ratio = (log_ratio * valid).sum(1, keepdim=True) / counts
        if bool(((advantages != advantages[:, :1]) & valid.bool()).any()):
            raise ValueError("`advantages` differ within a sample; takes one for each with stability='sequence'")
        advantages, valid = advantages[:, :1], torch.ones_like(counts)
    stable = stability_mask(log_ratio, advantages, kind=stability, clip=clip, clip_high=clip_high)
    ratio = log_ratio.exp()
    if stability == "detached":
        if reshape is not None:
            raise ValueError("`reshape` is given; takes None with stability='detached'")
        weight = ratio.detach().clamp(low, high) * (log_probs - log_probs.detach()).exp()
    else:
        weight = ratio if reshape is None else reshape(ratio)
    terms = -torch.where(stable, weight * advantages, (weight * advantages).detach()) * valid
    with torch.no_grad():
        kept = float((stable * valid).sum() / valid.sum())
        kl = float(((ratio * log_ratio - ratio + 1) * valid).sum() / valid.sum())
    return UnifiedLoss(*_reduced(terms, valid, reduction, constant), ratio.detach(), kept, kl)


def _range(clip: float, clip_high: float | None) -> tuple[float, float]:
    checked_number("clip", clip, least=0)
    if clip >= 1:
        raise ValueError(f"`clip` is {clip}; takes a number in [0, 1)")
    return 1 - clip, 1 + (clip if clip_high is None else checked_number("clip_high", clip_high, least=0))


def _shaped(log_probs: Tensor, advantages: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """All as (B, K) in one dtype; tokens that don't count have log-probability 0."""
    if log_probs.ndim not in (1, 2) or not log_probs.numel():
        raise ValueError(f"`log_probs` has shape {tuple(log_probs.shape)}; takes (B,) or (B, K), not empty")
    for name, value in (("advantages", advantages), ("mask", mask)):
        if value is not None and value.shape not in (log_probs.shape, log_probs.shape[:1]):
            shapes = f"{tuple(log_probs.shape)} or {tuple(log_probs.shape[:1])}"
            raise ValueError(f"`{name}` has shape {tuple(value.shape)}; takes {shapes}")
    rows, precise = len(log_probs), torch.promote_types(log_probs.dtype, torch.float32)
    log_probs = log_probs.to(precise).reshape(rows, -1)
    advantages = advantages.detach().to(precise).reshape(rows, -1).expand_as(log_probs)
    valid = torch.ones_like(log_probs) if mask is None else mask.to(precise).reshape(rows, -1).expand_as(log_probs)
    if not bool((valid.sum(1) > 0).all()):
        raise ValueError("`mask` has a sample without tokens; takes at least one in each")
    return torch.where(valid > 0, log_probs, 0), advantages, valid


def _reference(log_probs: Tensor, given: Tensor | str, valid: Tensor) -> Tensor:
    if isinstance(given, str):
        if checked_choice("ref_log_probs", given, ("current", "one")) == "current":
            return log_probs.detach()
        if bool((log_probs > 0).any()):
            raise ValueError(
                "`log_probs` has values above 0; takes those of a discrete policy with ref_log_probs='one'"
            )
        return torch.zeros_like(log_probs)
    if given.requires_grad:
        raise ValueError("`ref_log_probs` requires a gradient; takes a constant: detach() it")
    if given.numel() != log_probs.numel():
        raise ValueError(f"`ref_log_probs` has shape {tuple(given.shape)}; takes that of `log_probs`")
    return torch.where(valid > 0, given.to(log_probs.dtype).reshape(log_probs.shape), 0)


def _reduced(terms: Tensor, valid: Tensor, reduction: str, constant: float | None) -> tuple[Tensor, Tensor]:
    sums = terms.sum(1)
    if reduction == "sum":
        return sums.sum(), sums
    if reduction == "constant":
        if constant is None:
            raise ValueError("`constant` is None; takes a number with reduction='constant'")
        sums = sums / checked_number("constant", constant, above=0)
    elif reduction == "sequence":
        sums = sums / valid.sum(1)
    else:
        sums = sums * (len(sums) / valid.sum())
    return sums.mean(), sums
