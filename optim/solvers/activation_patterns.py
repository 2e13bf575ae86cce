"""Activation patterns of a layer of ReLUs over a data set: sampled, enumerated, or those of a given network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.optim.checks import checked_count, checked_generator, checked_number

__all__ = [
    "ActivationPatterns",
    "enumerate_patterns",
    "improvement_bound",
    "module_patterns",
    "sample_patterns",
    "with_ones",
]


@dataclass(frozen=True)
class ActivationPatterns:
    """Distinct rows of signs D_i = diag(1[X h_i >= 0]).

    Attributes:
        active: (P, n) bool, whether neuron i is active on row k.
        normals: (P, d) float64, an h_i of each pattern; d counts the column of ones where there is one.
        draws: how many normals were drawn to find them; 0 where they were not drawn.
        complete: all patterns that the data have are here.
    """

    active: Tensor
    normals: Tensor
    draws: int = 0
    complete: bool = False

    def __len__(self) -> int:
        return len(self.active)


def with_ones(X: Tensor, bias: bool) -> Tensor:
    """Data (n, d) in float64, with a column of ones for the neurons' biases.

    Raises:
        TypeError: if it is no floating tensor.
        ValueError: if it is no matrix, has no rows or has entries that are not finite.
    """
    if not isinstance(X, Tensor) or not X.is_floating_point():
        raise TypeError(f"`X` is {X.dtype if isinstance(X, Tensor) else type(X).__name__}; takes a floating tensor")
    if X.ndim != 2 or not X.numel():
        raise ValueError(f"`X` has shape {tuple(X.shape)}; takes (n, d) with rows and columns")
    if not bool(torch.isfinite(X).all()):
        raise ValueError("`X` has entries that are not finite")
    X = X.detach().double()
    return torch.cat([X, torch.ones_like(X[:, :1])], 1) if bias else X


def sample_patterns(
    X: Tensor,
    num: int,
    *,
    bias: bool = True,
    epsilon: float = 0.0,
    max_draws: int = 100_000,
    generator: torch.Generator | None = None,
) -> ActivationPatterns:
    """Patterns of random normals h ~ N(0, I), kept until `num` distinct ones are there.

    Source: "Efficient Global Optimization of Two-layer ReLU Networks" (arXiv:2201.01965), practical formulation.

    Args:
        X: (n, d) floating, the data.
        num: patterns to find, >= 1; fewer are returned where `max_draws` normals show no more.
        bias: neurons have a bias, a column of ones beside the data.
        epsilon: > 0 for adversarial training: each normal is also shown a copy of the data with every entry moved by
            up to this much, and gives the patterns of both.
        max_draws: normals at most.
        generator: of the draws; None is seed 0.

    Returns:
        The patterns, without the one that is active nowhere.

    Raises:
        ValueError: data that are no finite matrix, or a number out of range.

    Example:
        >>> len(sample_patterns(torch.tensor([[-1.0], [1.0], [2.0]]), 50))  # three points on a line: five and none
        5
    """
    A = with_ones(X, bias)
    checked_count("num", num)
    epsilon = checked_number("epsilon", epsilon, least=0)
    generator = checked_generator(generator)
    width = A.shape[1]
    active = torch.empty(0, len(A), dtype=torch.bool, device=A.device)
    normals = A.new_empty(0, width)
    draws = 0
    while len(active) < num and draws < max_draws:
        count = min(max(64, 2 * (num - len(active))), max_draws - draws)
        H = _normal((count, width), generator, A)
        seen = [(A @ H.T >= 0).T]
        if epsilon > 0:
            moved = A.clone()
            noise = torch.rand(X.shape, generator=generator, dtype=torch.float64, device=generator.device)
            moved[:, : X.shape[1]] += epsilon * (2 * noise - 1).to(A.device)
            seen.append((moved @ H.T >= 0).T)
        active, normals = _distinct(torch.cat([active, *seen]), torch.cat([normals, *[H] * len(seen)]))
        draws += count
    return ActivationPatterns(active[:num], normals[:num], draws)


def enumerate_patterns(X: Tensor, *, bias: bool = True, limit: int = 5000) -> ActivationPatterns:
    """All patterns of small data, row by row: a cell is cut by a row's hyperplane if a linear program finds both sides.

    In general position there are 2 sum_{k < d} C(n-1, k) with the one that is active nowhere (Cover, 1965), so this is
    for few rows or two or three columns.

    Args:
        X: (n, d) floating, the data.
        bias: as in `sample_patterns`.
        limit: patterns at most.

    Returns:
        The patterns, without the one that is active nowhere, their normals deep inside.

    Raises:
        ValueError: more patterns than `limit`, or data that are no finite matrix.
    """
    A = with_ones(X, bias).cpu()
    rows = A[A.norm(dim=1) > 0]
    cells: list[tuple[list[float], Tensor]] = [([], torch.zeros(A.shape[1], dtype=A.dtype))]
    for k in range(len(rows)):
        found = []
        for signs, _ in cells:
            for sign in (1.0, -1.0):
                normal = _inside(rows[: k + 1], [*signs, sign])
                if normal is not None:
                    found.append(([*signs, sign], normal))
        cells = found
        if len(cells) > limit + 1:
            raise ValueError(f"`X` has more than {limit} activation patterns; sample them, or raise `limit`")
    normals = torch.stack([normal for _, normal in cells]).to(X.device)
    A = A.to(X.device)
    active, normals = _distinct((A @ normals.T >= 0).T, normals)
    return ActivationPatterns(active, normals, complete=True)


def _inside(rows: Tensor, signs: list[float]) -> Tensor | None:
    """The point of a cell in the unit box that is farthest from its walls; None where the cell is empty."""
    import numpy as np
    from scipy.optimize import linprog

    sides = torch.tensor(signs, dtype=rows.dtype)[:, None] * rows / rows.norm(dim=1, keepdim=True)
    columns = rows.shape[1]
    cost = np.zeros(columns + 1)
    cost[-1] = -1
    walls = np.concatenate([-sides.numpy(), np.ones((len(signs), 1))], 1)
    bounds = [(-1, 1)] * columns + [(None, 1)]
    found = linprog(cost, A_ub=walls, b_ub=np.zeros(len(signs)), bounds=bounds, method="highs")
    return torch.from_numpy(found.x[:-1]) if found.status == 0 and -found.fun > 1e-9 else None


def module_patterns(module: nn.Sequential, X: Tensor) -> ActivationPatterns:
    """The patterns that the neurons of a network Linear, ReLU, Linear have on data.

    Args:
        module: the network; its first layer's biases make the column of ones.
        X: (n, d) floating.

    Returns:
        The patterns, neurons with the same one counted once, without the one that is active nowhere.

    Raises:
        ValueError: another network, or data that do not fit it.
    """
    first, _ = two_layers(module, X)
    A = with_ones(X, first.bias is not None)
    weight = first.weight if first.bias is None else torch.cat([first.weight, first.bias[:, None]], 1)
    normals = weight.detach().double().to(A.device)
    return ActivationPatterns(*_distinct((A @ normals.T >= 0).T, normals))


def two_layers(module: Any, X: Tensor) -> tuple[nn.Linear, nn.Linear]:
    """The layers of a network Linear, ReLU, Linear to one output; raises ValueError for another."""
    kinds = [type(part) for part in module] if isinstance(module, nn.Sequential) else []
    if kinds != [nn.Linear, nn.ReLU, nn.Linear] or module[2].out_features != 1:
        raise ValueError(f"`module` is {module}; takes nn.Sequential(Linear, ReLU, Linear) with one output")
    if X.ndim != 2 or X.shape[1] != module[0].in_features:
        raise ValueError(f"`X` has shape {tuple(X.shape)}; `module` takes (n, {module[0].in_features})")
    return module[0], module[2]


def improvement_bound(patterns: ActivationPatterns, num_rows: int, *, confidence: float = 0.95) -> float:
    """The probability that one more random pattern lowers the program's optimum is at most this.

    Sampling patterns samples constraints of the dual, which has n variables, one more for its value: P_s draws leave a
    probability psi of a violated constraint with confidence 1 - xi where P_s >= min{(n+1)/(psi xi) - 1,
    (2/psi)(n + 1 - log xi)}. Source: arXiv:2201.01965, its theorem on sampled patterns, by Calafiore and Campi's
    scenario approach, whose roles of psi (violation) and xi (confidence) are kept here.

    Args:
        patterns: of `sample_patterns`.
        num_rows: n, rows of the data.
        confidence: 1 - xi, in (0, 1).

    Returns:
        psi, at most 1; 0 where the patterns are complete.

    Raises:
        ValueError: `confidence` out of range, or patterns that were not drawn.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` is {confidence}; takes a number in (0, 1)")
    if patterns.complete:
        return 0.0
    if not patterns.draws:
        raise ValueError("`patterns` were not drawn at random: nothing can be said of a further one")
    xi, size = 1 - confidence, num_rows + 1
    return min(1.0, size / (xi * (patterns.draws + 1)), 2 * (size - math.log(xi)) / patterns.draws)


def _distinct(active: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that differ, in the order of their first appearance, and not all False."""
    order: dict[bytes, int] = {}
    for place, row in enumerate(active.cpu().numpy()):
        if row.any():
            order.setdefault(row.tobytes(), place)
    chosen = torch.tensor(list(order.values()), dtype=torch.long, device=active.device)
    return active[chosen], normals[chosen]


def _normal(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device).to(like.device)
