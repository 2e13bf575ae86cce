"""How well classes can be told apart from features: a kernel's estimate of the Bayes error, and a bracket."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from trimtab.optim.checks import checked_choice, checked_count, checked_number

__all__ = ["BayesErrorReport", "bayes_error", "bayes_error_report", "label_bandwidth", "mixture_lower_bound"]

Kernel = Literal["rbf", "sigmoid"] | Callable[[Tensor, Tensor], Tensor]
Bandwidth = float | Literal["auto"]
BANDWIDTHS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
"""Times the median distance, of which "auto" takes the likeliest."""


@dataclass(frozen=True)
class BayesErrorReport:
    """How well classes can be told apart from features; none of these is *the* Bayes error.

    Attributes:
        estimate: the kernel's, see :func:`bayes_error`; much too high in many dimensions.
        ratio: of that to 1 - the largest class's share, which it cannot much exceed: 1 is "cannot be told apart".
        per_class: its mean over each class.
        knn_lower: what the Bayes error is at least if the nearest neighbour's error is its limit (Cover and Hart).
        knn_upper: the nearest neighbour's leave-one-out error, which the Bayes error is below in that limit.
        bandwidth: of the kernel.
    """

    estimate: float
    ratio: float
    per_class: dict[int, float]
    knn_lower: float
    knn_upper: float
    bandwidth: float


def bayes_error(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    bandwidth: Bandwidth = "auto",
    kernel: Kernel = "rbf",
    normalize: bool = True,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
    groups: Tensor | None = None,
    chunk_size: int = 1024,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """1 - max_k p_k, where p_k is the share of class k among the other examples, weighted by a kernel.

    With z the features over their largest absolute value and s_ij = exp(-||z_i - z_j||^2 / 2 bandwidth^2),
    s_ii = 0: p_ik = sum_j s_ij [y_j = k] / sum_j s_ij. Source: Zhang, Sun, Lim, Zhang, "Towards Provably Unlearnable
    Examples via Bayes Error Optimisation" (arXiv 2511.08191). Here p is a softmax of log s, so that an example far
    from all others has its nearest neighbour's class in the place of none. A diagnostic, not a bound on the true Bayes
    error: in many dimensions it is far too high.

    Args:
        features: (N, ...) floating, N >= 3; flattened. Gradients flow to them, the largest value held fixed.
        labels: (N,) integers from 0, of two classes or more.
        num_classes: None is the largest label + 1.
        bandwidth: > 0; "auto" is :func:`label_bandwidth`'s. Only of "rbf".
        kernel: "rbf"; "sigmoid", s_ij = sigmoid(z_i . z_j); or a function of z (n, d) and z (m, d) that gives
            log s (n, m).
        normalize: divide by the largest absolute value.
        reference: (M, ...), estimate against these instead, none left out.
        reference_labels: (M,) of those.
        groups: (N,) integers; examples of one group, such as crops of one picture, don't count for each other.
        chunk_size: rows at once, at the memory of chunk_size x N numbers.
        reduction: "mean", or "none" for (N,).

    Returns:
        A single number or (N,), of the features' dtype, in [0, 1 - 1 / K].

    Raises:
        TypeError: features that are no floating tensor, labels that are no integers.
        ValueError: shapes that do not fit, fewer than two classes or three examples, a value out of range, or an
            example whose group is everything.

    Example:
        >>> x = torch.tensor([[0.0], [0.1], [1.0], [0.9]])
        >>> round(float(bayes_error(x, torch.tensor([0, 0, 1, 1]), bandwidth=0.1)), 4)
        0.0
    """
    checked_choice("reduction", reduction, ("mean", "none"))
    checked_count("chunk_size", chunk_size)
    x, y = _checked("features", features, labels)
    other, other_y = (x, y) if reference is None else _checked("reference", reference, reference_labels)
    if x.shape[1] != other.shape[1]:
        raise ValueError(f"`reference` has {other.shape[1]} features; takes {x.shape[1]}")
    largest = max(int(y.max()), int(other_y.max()))
    count = largest + 1 if num_classes is None else checked_count("num_classes", num_classes, 2)
    if largest >= count:
        raise ValueError(f"`num_classes` is {count} and a label {largest}; takes more")
    own = _groups(groups, reference, y)
    if normalize:
        scale = torch.maximum(x.detach().abs().max(), other.detach().abs().max())
        scale = scale.clamp_min(torch.finfo(x.dtype).tiny)
        x, other = x / scale, other / scale
    if kernel != "rbf":
        width = 1.0
    elif bandwidth == "auto":
        width = _likeliest(x.detach(), y, other.detach(), other_y, own, chunk_size)
    else:
        width = checked_number("bandwidth", bandwidth, above=0)
    values = []
    classes = one_hot(other_y, count).to(x.dtype)
    for _, log in _log_weights(x, other, own, kernel, width, chunk_size):
        values.append((1 - (log.softmax(1) @ classes).max(1).values).clamp_min(0))
    each = torch.cat(values)
    return each.mean() if reduction == "mean" else each


def label_bandwidth(
    features: Tensor, labels: Tensor, *, normalize: bool = True, groups: Tensor | None = None, chunk_size: int = 1024
) -> float:
    """The bandwidth under which labels are likeliest, each by the other examples: of nine multiples of the median
    distance, .05 to 1.

    Args, Raises:
        As :func:`bayes_error`.
    """
    with torch.no_grad():
        x, y = _checked("features", features, labels)
        if normalize:
            x = x / x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
        return _likeliest(x, y, x, y, _groups(groups, None, y), chunk_size)


def bayes_error_report(features: Tensor, labels: Tensor, bandwidth: Bandwidth = "auto") -> BayesErrorReport:
    """The estimate beside a bracket by nearest neighbours, which many dimensions mislead less.

    Args:
        features: (N, ...) floating.
        labels: (N,) integers from 0.
        bandwidth: as in :func:`bayes_error`.

    Raises:
        TypeError, ValueError: as :func:`bayes_error`.

    Example:
        >>> report = bayes_error_report(torch.tensor([[0.0], [0.1], [1.0], [0.9]]), torch.tensor([0, 0, 1, 1]))
        >>> report.knn_lower, report.knn_upper, report.ratio < 0.1
        (0.0, 0.0, True)
    """
    with torch.no_grad():
        x, y = _checked("features", features, labels)
        width = label_bandwidth(x, y) if bandwidth == "auto" else checked_number("bandwidth", bandwidth, above=0)
        each = bayes_error(x, y, bandwidth=width, reduction="none")
        own = torch.arange(len(y), device=y.device)
        wrong = torch.cat([y[log.argmax(1)] != y[rows] for rows, log in _log_weights(x, x, own, "rbf", 1.0, 1024)])
    error, classes = float(wrong.double().mean()), len(y.unique())
    share = classes / (classes - 1)
    lower = (1 - math.sqrt(max(0.0, 1 - share * error))) / share
    limit = 1 - float(y.bincount().max()) / len(y)
    per_class = {int(label): float(each[y == label].mean()) for label in y.unique()}
    return BayesErrorReport(float(each.mean()), float(each.mean()) / limit, per_class, lower, error, width)


def mixture_lower_bound(be_protected: float, be_clean: float, fraction: float) -> float:
    """The least Bayes error of a mixture: 1 - int max_k P(x, k) dx is concave in the joint law P.

    Whatever is trained on the mixture errs at least so much on the mixture. It bounds nothing about clean data alone.

    Args:
        be_protected: of the protected data, in [0, 1].
        be_clean: of the clean data, in [0, 1].
        fraction: of protected data in the mixture, in [0, 1].

    Raises:
        ValueError: a value outside of [0, 1].

    Example:
        >>> mixture_lower_bound(0.5, 0.1, 0.25)
        0.2
    """
    for name, value in (("be_protected", be_protected), ("be_clean", be_clean), ("fraction", fraction)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` is {value}; takes a number in [0, 1]")
    return fraction * be_protected + (1 - fraction) * be_clean


def _checked(name: str, features: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Features (N, d) and labels (N,) int64."""
    which = "labels" if name == "features" else "reference_labels"
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"`{name}` is {got}; takes a floating tensor")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"`{which}` is {got}; takes a tensor of integers")
    if features.ndim < 2 or labels.shape != features.shape[:1]:
        shapes = f"{tuple(features.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"`{name}` and `{which}` have shapes {shapes}; takes (N, ...) and (N,)")
    least = 3 if name == "features" else 1
    if len(labels) < least or (least == 3 and len(labels.unique()) < 2) or int(labels.min()) < 0:
        raise ValueError(f"`{which}` has {len(labels)} values; takes {least} or more from 0, of two classes at least")
    if not bool(torch.isfinite(features.detach()).all()):
        raise ValueError(f"`{name}` has values that are not finite; takes finite ones")
    return features.flatten(1), labels.long()


def _groups(groups: Tensor | None, reference: Tensor | None, labels: Tensor) -> Tensor | None:
    if groups is None:
        return torch.arange(len(labels), device=labels.device) if reference is None else None
    if reference is not None or groups.shape != labels.shape or len(groups.unique()) < 2:
        takes = f"({len(labels)},) of two groups or more, without a `reference`"
        raise ValueError(f"`groups` has shape {tuple(groups.shape)}; takes {takes}")
    return groups


def _log_weights(
    x: Tensor, other: Tensor, own: Tensor | None, kernel: Kernel, width: float, chunk_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For chunks of rows, these and log s, -inf where an example doesn't count."""
    for rows in torch.arange(len(x), device=x.device).split(chunk_size):
        part = x[rows]
        if kernel == "rbf":
            log = _squares(part, other) / (-2 * width**2)
        elif kernel == "sigmoid":
            log = logsigmoid(part @ other.T)
        else:
            log = kernel(part, other)
        if own is not None:
            log = log.masked_fill(own[rows][:, None] == own[None, :], -torch.inf)
        yield rows, log


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances; a distance itself has no gradient at 0."""
    return (a.square().sum(1)[:, None] + b.square().sum(1)[None, :] - 2 * a @ b.T).clamp_min(0)


@torch.no_grad()
def _likeliest(x: Tensor, y: Tensor, other: Tensor, other_y: Tensor, own: Tensor | None, chunk_size: int) -> float:
    some = _squares(x[:1024], other[:1024])
    positive = some[some > 0]
    median = float(positive.median().sqrt()) if len(positive) else 1.0
    scores = torch.zeros(len(BANDWIDTHS), dtype=torch.float64)
    for rows, log in _log_weights(x, other, own, "rbf", 1.0, chunk_size):
        same = y[rows][:, None] == other_y[None, :]
        for index, factor in enumerate(BANDWIDTHS):
            p = (log / (factor * median) ** 2).softmax(1).masked_fill(~same, 0).sum(1)
            scores[index] += float(p.clamp_min(1e-6).log().sum())
    return BANDWIDTHS[int(scores.argmax())] * median
