"""What kind of solution training found: its rank, its sparsity, how far it went and what it forgot."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.optim.checks import checked_count

__all__ = [
    "ForgettingReport",
    "SolutionReport",
    "class_similarity",
    "collect_features",
    "effective_rank",
    "forgetting_report",
    "solution_report",
]


@dataclass(frozen=True)
class ForgettingReport:
    """Scores after each of several tasks learnt one after another.

    Attributes:
        matrix: float (T, T), the score on task j after training task i.
        average: mean of the last row.
        forgetting: mean over j < T of the best score ever had on task j less the last; >= 0.
        backward_transfer: mean over j < T of the last score less that right after training task j.
    """

    matrix: Tensor
    average: float
    forgetting: float
    backward_transfer: float


@dataclass(frozen=True)
class SolutionReport:
    """What training made of a model's matrices, each entry by parameter name.

    Attributes:
        sparsity: part of the weights that are below 1 % of their root mean square.
        effective_rank: of what was added, see :func:`effective_rank`; 0 where nothing was.
        distance: Frobenius norm of what was added.
        relative_distance: the same over the norm of the starting weights, infinite where they were 0.
    """

    sparsity: dict[str, float]
    effective_rank: dict[str, float]
    distance: dict[str, float]
    relative_distance: dict[str, float]

    def means(self) -> dict[str, float]:
        """The mean over parameters of each attribute (finite ones)."""
        columns = {name: list(values.values()) for name, values in vars(self).items()}
        finite = {name: [v for v in values if v < float("inf")] for name, values in columns.items()}
        return {name: sum(values) / max(1, len(values)) for name, values in finite.items()}


def effective_rank(x: Tensor, *, center: bool = True) -> float:
    """exp(entropy) of the singular values over their sum, between 1 and the rank; 0 for a zero matrix.

    Source: Roy and Vetterli, "The effective rank" (2007), as Pascanu et al. use it (arXiv 2507.12224).

    Args:
        x: features (N, h), or a weight (m, n) with ``center=False``; floating.
        center: subtract the mean over the first axis.

    Raises:
        TypeError: no floating tensor.
        ValueError: other than two axes, empty, or not finite.

    Example:
        >>> round(effective_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0])), center=False), 6)
        2.828427
    """
    _check_matrix("x", x)
    wide = x.detach().to(torch.float64)
    values = torch.linalg.svdvals(wide - wide.mean(0) if center else wide)
    if float(values.sum()) <= 1e-12:
        return 0.0
    return float(torch.distributions.Categorical(values / values.sum()).entropy().exp())


def class_similarity(features: Tensor, labels: Tensor, *, center: bool = False) -> Tensor:
    """Cosine of the classes' mean features, (C, C): how much they share. A mean of 0 gives zeros, and a warning.

    Args:
        features: (N, h), floating.
        labels: (N,), C >= 2 different values, which are taken in ascending order.
        center: subtract the mean of all features first.

    Raises:
        TypeError, ValueError: as :func:`effective_rank`; labels of another length or of one class.
    """
    _check_matrix("features", features)
    if labels.shape != features.shape[:1]:
        raise ValueError(f"`labels` has shape {tuple(labels.shape)}; takes ({len(features)},), as many as features")
    classes = labels.unique()
    if len(classes) < 2:
        raise ValueError(f"`labels` has {len(classes)} class; takes at least two")
    wide = features.detach().double()
    wide = wide - wide.mean(0) if center else wide
    means = torch.stack([wide[labels == label].mean(0) for label in classes])
    norms = means.norm(dim=1, keepdim=True)
    if bool((norms == 0).any()):
        warnings.warn("a class has features of mean 0, which have no direction", stacklevel=2)
    unit = means / norms.clamp_min(torch.finfo(torch.float64).tiny)
    return unit @ unit.T


def forgetting_report(scores: Any) -> ForgettingReport:
    """What was forgotten of tasks learnt one after another.

    Args:
        scores: (T, T), higher is better; ``scores[i][j]`` on task j after training task i. What lies above the diagonal
            counts for nothing.

    Raises:
        ValueError: not square, or not finite on and below the diagonal.

    Example:
        >>> report = forgetting_report([[0.9, 0.0], [0.5, 0.8]])
        >>> round(report.average, 6), round(report.forgetting, 6), round(report.backward_transfer, 6)
        (0.65, 0.4, -0.4)
    """
    matrix = torch.as_tensor(scores, dtype=torch.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"`scores` has shape {tuple(matrix.shape)}; takes a square matrix")
    if not bool(torch.isfinite(matrix.tril()).all()):
        raise ValueError("`scores` has values that are not finite")
    last, count = matrix[-1], len(matrix) - 1
    best = [matrix[j:, j].max() for j in range(count)]
    forgetting = sum(float(best[j] - last[j]) for j in range(count)) / max(1, count)
    transfer = sum(float(last[j] - matrix[j, j]) for j in range(count)) / max(1, count)
    return ForgettingReport(matrix, float(last.mean()), forgetting, transfer)


@torch.no_grad()
def collect_features(
    model: nn.Module, dataloader: Iterable[Any], layer: str, *, max_batches: int | None = None
) -> tuple[Tensor, Tensor]:
    """What a layer gives for batches of (inputs, labels): features (N, h), on the CPU, and labels (N,).

    Args:
        model: called with the inputs, in evaluation mode.
        dataloader: of pairs.
        layer: its qualified name; outputs beyond two axes are flattened.
        max_batches: None takes all.

    Raises:
        ValueError: no such layer, or no batch.
    """
    layers = dict(model.named_modules())
    if layer not in layers:
        raise ValueError(f"`layer` is {layer!r}; takes one of {', '.join(filter(None, layers))}")
    if max_batches is not None:
        checked_count("max_batches", max_batches)
    kept: list[Tensor] = []
    handle = layers[layer].register_forward_hook(lambda _, __, out: kept.append(out.detach().flatten(1).cpu()))
    training, labels = model.training, []
    model.eval()
    try:
        for number, (inputs, label) in enumerate(dataloader):
            if number == max_batches:
                break
            model(inputs)
            labels.append(label.cpu())
    finally:
        handle.remove()
        model.train(training)
    if not kept:
        raise ValueError("`dataloader` has no batch; takes at least one")
    return torch.cat(kept), torch.cat(labels)


@torch.no_grad()
def solution_report(model: nn.Module, start: Mapping[str, Tensor]) -> SolutionReport:
    """Compares a trained model's matrices with where they started.

    Args:
        model: its parameters of two or more axes are measured, kernels as (out, rest).
        start: its ``state_dict`` before training, copied (``{k: v.clone() for ...}``).

    Raises:
        ValueError: a matrix that ``start`` has not, or has in another shape.
    """
    sparsity, rank, distance, relative = {}, {}, {}, {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        if name not in start or start[name].shape != parameter.shape:
            got = tuple(start[name].shape) if name in start else "nothing"
            raise ValueError(f"`start` has {got} for {name!r}; takes {tuple(parameter.shape)}")
        weight = parameter.detach().double().flatten(1)
        first = start[name].detach().to(weight).flatten(1)
        moved = weight - first
        sparsity[name] = float((weight.abs() <= 0.01 * weight.square().mean().sqrt()).double().mean())
        rank[name] = effective_rank(moved, center=False)
        distance[name] = float(moved.norm())
        relative[name] = distance[name] / float(first.norm()) if bool(first.any()) else float("inf")
    return SolutionReport(sparsity, rank, distance, relative)


def _check_matrix(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"`{name}` is {got}; takes a floating tensor")
    if value.ndim != 2 or not value.numel():
        raise ValueError(f"`{name}` has shape {tuple(value.shape)}; takes two axes, neither empty")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"`{name}` has values that are not finite")
