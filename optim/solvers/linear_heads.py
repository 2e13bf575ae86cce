"""Linear heads on fixed features: logistic, Bradley-Terry and softmax, fitted by Newton's method."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from .newton import NewtonResult, gradient_normalized_newton

__all__ = ["LinearHead", "fit_linear_head", "fit_preference_head"]


class LinearHead(torch.nn.Linear):
    """A linear layer with how it was fitted in `result`."""

    result: NewtonResult


def fit_linear_head(
    features: Tensor,
    labels: Tensor,
    *,
    l2: float = 1e-2,
    weights: Tensor | None = None,
    max_iterations: int = 200,
    grad_tolerance: float = 1e-8,
) -> LinearHead:
    """Logistic regression, or softmax regression of three or more classes, to its optimum.

    min_W sum_k t_k loss(W x_k + c, y_k) / sum_k t_k + (l2 / 2) ||W||^2, the intercept c not penalized, by
    `gradient_normalized_newton` (arXiv:2506.13710) with the exact Hessian.

    Args:
        features: (N, d) floating, finite.
        labels: (N,) integers or booleans from 0 to C - 1, all classes there; two classes give one output, the logit
            of class 1.
        l2: > 0, so that an optimum exists where the classes can be separated.
        weights: (N,) trust t_k >= 0 of each example, not all 0; None is 1.
        max_iterations: of Newton's method.
        grad_tolerance: of the gradient's norm.

    Returns:
        A layer d to 1, or to C; float32 or float64 as the features, on their device.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, fewer than two classes, `l2` not positive,
            weights out of range.

    Example:
        >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
        >>> head = fit_linear_head(x, torch.tensor([0, 0, 1, 1]))
        >>> (head(x)[:, 0] > 0).tolist()
        [False, False, True, True]
    """
    x = _checked(features, "features", l2)
    if labels.shape != x.shape[:1] or labels.is_floating_point():
        raise ValueError(f"`labels` is {labels.dtype} {tuple(labels.shape)}; takes ({len(x)},) integers or booleans")
    y = labels.to(x.device).long()
    counts = torch.bincount(y.clamp_min(0))
    if int(y.min()) < 0 or len(counts) < 2 or not bool(counts.all()):
        present = sorted(set(y.tolist()))
        raise ValueError(f"`labels` has the classes {present}; takes 0 to C - 1, at least two and each of them there")
    outputs = 1 if len(counts) == 2 else len(counts)
    trust = _trust(weights, x)

    def split(theta: Tensor) -> tuple[Tensor, Tensor]:
        return theta[:, :-1], theta[:, -1]

    def objective(theta: Tensor) -> Tensor:
        weight, bias = split(theta)
        logits = x @ weight.T + bias
        if outputs == 1:
            loss = trust @ softplus(torch.where(y == 1, -logits[:, 0], logits[:, 0]))
        else:
            # The intercepts' common shift is free; a tiny pull to 0 makes the optimum unique.
            loss = trust @ cross_entropy(logits, y, reduction="none") + l2 / 2 * bias.mean().square()
        return loss + l2 / 2 * weight.square().sum()

    def hessian(flat: Tensor) -> Tensor:
        """Closed form: sum_k t_k (Diag(p) - p p^T) (x) x x^T / sum_k t_k, plus the penalty."""
        weight, bias = split(flat.reshape(outputs, -1))
        logits = x @ weight.T + bias
        wide = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        width = wide.shape[1]
        if outputs == 1:
            p = torch.sigmoid(logits)
            curvature = (p * (1 - p))[:, :, None]
        else:
            p = torch.softmax(logits, 1)
            curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        blocks = torch.einsum("n,nab,ni,nj->aibj", trust, curvature, wide, wide)
        penalty = torch.full((outputs, width), l2, dtype=x.dtype, device=x.device)
        penalty[:, -1] = 0
        H = blocks.reshape(outputs * width, -1) + torch.diag(penalty.flatten())
        if outputs > 1:
            last = torch.arange(outputs, device=x.device) * width + width - 1
            H[last[:, None], last[None]] += l2 / outputs**2
        return H

    start = torch.zeros(outputs, x.shape[1] + 1, dtype=x.dtype, device=x.device)
    result = gradient_normalized_newton(
        objective, start, hessian=hessian, max_iterations=max_iterations, grad_tolerance=grad_tolerance
    )
    return _layer(result, *split(result.x), features)


def fit_preference_head(
    better: Tensor,
    worse: Tensor,
    *,
    l2: float = 1e-2,
    weights: Tensor | None = None,
    max_iterations: int = 200,
    grad_tolerance: float = 1e-8,
    hessian: Literal["exact", "zero"] = "exact",
) -> LinearHead:
    """Bradley and Terry's model of preferences, linear in features, to its optimum.

    min_w sum_k c_k softplus(-<w, x_k - x'_k>) / sum_k c_k + (l2 / 2) ||w||^2, where x_k was preferred to x'_k; by
    `gradient_normalized_newton` (arXiv:2506.13710).

    Args:
        better: (N, d) floating, finite.
        worse: likewise, row by row.
        l2: > 0.
        weights: (N,) trust c_k >= 0 of each pair, not all 0; None is 1.
        max_iterations: of Newton's method.
        grad_tolerance: of the gradient's norm.
        hessian: "exact", or "zero" for a first-order run.

    Returns:
        A layer d to 1 without bias: its differences are log odds.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, `l2` not positive, weights out of range.
    """
    first, second = _checked(better, "better", l2), _checked(worse, "worse", l2)
    if first.shape != second.shape:
        raise ValueError(f"`worse` has shape {tuple(worse.shape)}; takes that of `better`, {tuple(better.shape)}")
    x = first - second
    c = _trust(weights, x)

    def objective(w: Tensor) -> Tensor:
        return (c * softplus(-(x @ w))).sum() + l2 / 2 * w.square().sum()

    def curvature(w: Tensor) -> Tensor:
        p = torch.sigmoid(x @ w)
        return (x.T * (c * p * (1 - p))) @ x + l2 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)

    result = gradient_normalized_newton(
        objective,
        torch.zeros(x.shape[1], dtype=x.dtype, device=x.device),
        hessian=curvature if hessian == "exact" else hessian,
        max_iterations=max_iterations,
        grad_tolerance=grad_tolerance,
    )
    return _layer(result, result.x[None], None, better)


def _layer(result: NewtonResult, weight: Tensor, bias: Tensor | None, like: Tensor) -> LinearHead:
    head = LinearHead(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    head.result = result
    return head.to(like.device, torch.promote_types(like.dtype, torch.float32))


def _trust(weights: Tensor | None, x: Tensor) -> Tensor:
    """Weights of examples (N, d), which sum to 1; equal ones where none are given."""
    trust = torch.ones_like(x[:, 0]) if weights is None else weights.to(x)
    if trust.shape != x.shape[:1] or not bool((trust >= 0).all()) or not bool(trust.sum() > 0):
        raise ValueError(f"`weights` has shape {tuple(trust.shape)}; takes ({len(x)},) numbers >= 0, not all 0")
    return trust / trust.sum()


def _checked(x: Tensor, name: str, l2: float) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point() or not x.numel():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"`{name}` is {got}; takes a floating tensor (N, d) with N >= 1")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"`{name}` has entries that are not finite")
    if not l2 > 0:
        raise ValueError(f"`l2` is {l2}; takes a number > 0")
    return x.detach().double()
