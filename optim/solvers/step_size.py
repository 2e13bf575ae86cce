"""The largest step at which a fixed-point iteration on f(x) = y is safe, estimated from pairs of points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch

__all__ = ["StepSizeReport", "estimate_step_size"]


@dataclass(frozen=True)
class StepSizeReport:
    """Bounds on the step size from sampled pairs.

    Attributes:
        bound: (B,) on the CPU, the chosen quantile of a row's positive ratios; a run takes half of it, which is where
            the guaranteed decrease is largest. NaN where a row has no positive ratio.
        local_ratios: (pairs, B) on the CPU, 2 <dx, df> / ||df||^2 of near points; NaN where df is 0.
        global_ratios: (pairs, B) on the CPU, the same of far points.
        negative_fraction: share of pairs with a ratio <= 0. Above 0 no step size satisfies the theorem's condition.
        num_function_evaluations: calls of f that it took.
    """

    bound: torch.Tensor
    local_ratios: torch.Tensor
    global_ratios: torch.Tensor
    negative_fraction: float
    num_function_evaluations: int


@torch.no_grad()
def estimate_step_size(
    f: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    *,
    value: torch.Tensor | None = None,
    local_points: int = 3,
    global_points: int = 2,
    local_scale: float = 0.05,
    quantile: float = 0.1,
    generator: torch.Generator | None = None,
) -> StepSizeReport:
    """Samples the bound 2 <x - x', f(x) - f(x')> / ||f(x) - f(x')||^2 of FlowOpt's convergence theorem.

    The theorem ("FlowOpt", arXiv:2510.22010) wants the step below the bound of every pair, near ones and far ones, so
    both are drawn. `x` itself is one of the points, the near ones are `x` plus noise, the far ones noise with the mean
    and deviation of `x`; every two of a kind, and each with `x`, make a pair. The least of many ratios would be ruled
    by a single one, so a low quantile stands for it.

    Args:
        f: (B, ...) to the same shape, rows independently.
        x: (B, ...) floating, where the iteration is to start.
        value: f(x), where it is known already; else it is computed.
        local_points: near points, >= 0.
        global_points: far points, >= 0; one of the two counts is positive.
        local_scale: length of the noise of near points, relative to the deviation of `x`; > 0.
        quantile: of the positive ratios that is the bound, in [0, 1]; 0 is their least.
        generator: of the noise; None is seed 0. It may be on another device than `x`.

    Returns:
        The report; bounds row by row.

    Raises:
        ValueError: an argument out of range, or f has the same value at all points.

    Example:
        >>> A = torch.tensor([[0.8, -0.6], [0.6, 0.8]])  # every pair: 2 * 0.8 / (0.8^2 + 0.6^2)
        >>> report = estimate_step_size(lambda x: x @ A.T, torch.tensor([[1.0, 2.0]]))
        >>> round(report.bound.item(), 3), report.negative_fraction
        (1.6, 0.0)
    """
    if local_points < 0 or global_points < 0 or local_points + global_points < 1:
        raise ValueError(f"`local_points` is {local_points}, `global_points` {global_points}; takes >= 0, not both 0")
    if not local_scale > 0:
        raise ValueError(f"`local_scale` is {local_scale}; takes a number > 0")
    if not 0 <= quantile <= 1:
        raise ValueError(f"`quantile` is {quantile}; takes a number in [0, 1]")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype)
    flat = x.flatten(1)
    mean, std = (s.reshape(-1, *[1] * (x.ndim - 1)) for s in (flat.mean(1), flat.std(1, correction=0)))
    std = torch.where(std > 0, std, torch.ones_like(std))

    def noise() -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, device=generator.device).to(x.device, dtype)

    calls = 0
    if value is None:
        value, calls = f(x).to(dtype), 1
    start = (x, value.to(dtype))
    near = [x + local_scale * std * noise() for _ in range(local_points)]
    far = [mean + std * noise() for _ in range(global_points)]
    near, far = ([start, *((point, f(point).to(dtype)) for point in points)] for points in (near, far))
    ratios = [_ratios(points) for points in (near, far)]
    both = torch.cat(ratios)
    known = ~both.isnan()
    if not bool(known.any()):
        raise ValueError("`f` has the same value at all sampled points: there is no step size to estimate")
    negative = int((both <= 0).sum()) / int(known.sum())
    bound = torch.nanquantile(torch.where(both > 0, both, torch.nan), quantile, dim=0)
    return StepSizeReport(bound, *ratios, negative, calls + local_points + global_points)


def _ratios(points: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """(pairs, B) of all pairs of (x, f(x)); NaN where f is the same."""
    rows = []
    for (x, fx), (other, f_other) in combinations(points, 2):
        dx, df = (x - other).flatten(1), (fx - f_other).flatten(1)
        square = df.square().sum(1)
        rows.append(torch.where(square > 0, 2 * (dx * df).sum(1) / square, torch.nan).cpu())
    return torch.stack(rows) if rows else torch.empty(0, len(points[0][0]))
