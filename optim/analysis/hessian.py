"""The spectrum of a Hessian: its density, its trace, how many eigenvalues stand out, what step is stable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_count, checked_generator, checked_number

from .lanczos import LanczosResult, lanczos
from .operators import SymmetricOperator

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SpectrumResult", "count_outliers", "hessian_spectrum", "hutchinson_trace"]

MAX_OUTLIERS = 12
_KAPPA = 3.0


@dataclass(frozen=True)
class SpectrumResult:
    """A spectrum by quadrature. Tensors are float64 on the CPU.

    Attributes:
        grid: (num_points,), places on the axis of eigenvalues.
        density: (num_points,), there, every eigenvalue smoothed by a Gaussian; integrates to about 1.
        nodes: (K,), the quadrature's nodes of all probes.
        weights: (K,), their weights, which sum to 1.
        size: n, of the matrix.
        trace: its estimate.
        trace_std: standard error of that over probes; NaN with one probe.
        frobenius_sq: estimate of the sum of squared eigenvalues.
        lambda_max: the largest eigenvalue.
        lambda_min: the smallest eigenvalue.
        top: (r,), the largest eigenvalues that are known to 1 %, descending.
        num_outliers: how many positive eigenvalues stand out above the others, see :func:`count_outliers`.
        gap_ratio: the last of those over the next: near 1 nothing stands out.
        num_products: with the matrix.
    """

    grid: Tensor
    density: Tensor
    nodes: Tensor
    weights: Tensor
    size: int
    trace: float
    trace_std: float
    frobenius_sq: float
    lambda_max: float
    lambda_min: float
    top: Tensor
    num_outliers: int
    gap_ratio: float
    num_products: int

    @property
    def max_learning_rate(self) -> float:
        """2 / lambda_max, beyond which gradient descent on the quadratic model diverges; infinite without any
        positive curvature."""
        return 2 / self.lambda_max if self.lambda_max > 0 else math.inf

    def fraction_below(self, part: float = 0.01) -> float:
        """Part of the eigenvalues whose size is less than so much of the largest one's."""
        sizes = self.nodes.abs()
        return float(self.weights[sizes < part * float(sizes.max())].sum())

    def trace_of(self, function: Callable[[Tensor], Tensor]) -> float:
        """Estimate of the sum of an elementwise function of the eigenvalues."""
        return self.size * float((self.weights * function(self.nodes)).sum())

    def picture(self, title: str = "Hessian's eigenvalues") -> Image:
        """The density on a logarithmic axis, known outliers marked."""
        from .pictures import spectrum_picture

        return spectrum_picture(self, title)


def hessian_spectrum(
    op: SymmetricOperator,
    *,
    num_steps: int = 100,
    num_probes: int = 4,
    num_points: int = 1024,
    sigma: float | None = None,
    generator: torch.Generator | None = None,
    reorthogonalize: bool = True,
    callback: Callable[[int, int], Any] | None = None,
) -> SpectrumResult:
    """Stochastic Lanczos quadrature: phi(t) = mean over probes of sum_l weight_l N(t; theta_l, sigma^2).

    Near a minimum of a loss with many more weights than examples, most eigenvalues are near 0 and a few stand out,
    about one fewer than there are classes: Sagun, Evci, Guney, Dauphin, Bottou, "Empirical Analysis of the Hessian of
    Over-Parametrized Neural Networks" (arXiv 1706.04454). The quadrature is that of Ghorbani, Krishnan, Xiao
    (arXiv 1901.10159); the default width that of Papyan, "Traces of Class/Cross-Class Structure Pervade Deep Learning
    Spectra" (2020).

    Args:
        op: the matrix, such as :func:`~trimtab.optim.hessian_operator`'s.
        num_steps: products for each probe, n at most.
        num_probes: random starts; their spread is what `trace_std` tells.
        num_points: of the density.
        sigma: width of the Gaussians; None is the spectrum's half width (5 % more) times
            2 / ((m - 1) sqrt(8 log 3)) with m steps.
        generator: of the probes; None is seed 0.
        reorthogonalize: see :func:`~trimtab.optim.lanczos`.
        callback: called as (products taken, products in all) after each; True ends the run there, with a result of
            what is done.

    Raises:
        ValueError: a value out of range.
        RuntimeError: a product that isn't finite.

    Example:
        >>> spectrum = hessian_spectrum(SymmetricOperator.from_matrix(torch.diag(torch.tensor([4.0, 1.0, 1.0]))))
        >>> round(spectrum.lambda_max, 6), round(spectrum.trace, 6), round(spectrum.max_learning_rate, 6)
        (4.0, 6.0, 0.5)
    """
    checked_count("num_steps", num_steps)
    checked_count("num_probes", num_probes)
    checked_count("num_points", num_points, 2)
    random, first = checked_generator(generator), op.num_products
    total, stopped, runs = min(num_steps, op.size) * num_probes, False, []

    def each(step: int, steps: int) -> bool:
        nonlocal stopped
        stopped = callback is not None and bool(callback(len(runs) * steps + step, total))
        return stopped

    for _ in range(num_probes):
        runs.append(lanczos(op, num_steps, generator=random, reorthogonalize=reorthogonalize, callback=each))
        if stopped:
            break
    nodes = torch.cat([run.ritz_values for run in runs])
    weights = torch.cat([run.weights for run in runs]) / len(runs)
    traces = op.size * torch.stack([(run.weights * run.ritz_values).sum() for run in runs])
    low, high = float(nodes.min()), float(nodes.max())
    steps = max(len(run.alpha) for run in runs)
    grid, density = _density(nodes, weights, low, high, steps, num_points, sigma)
    top = _known(runs, MAX_OUTLIERS + 1)
    outliers, ratio = count_outliers(top)
    return SpectrumResult(
        grid=grid,
        density=density,
        nodes=nodes,
        weights=weights,
        size=op.size,
        trace=float(traces.mean()),
        trace_std=float(traces.std() / len(runs) ** 0.5) if len(runs) > 1 else math.nan,
        frobenius_sq=op.size * float((weights * nodes.square()).sum()),
        lambda_max=high,
        lambda_min=low,
        top=top,
        num_outliers=outliers,
        gap_ratio=ratio,
        num_products=op.num_products - first,
    )


def hutchinson_trace(
    op: SymmetricOperator, num_probes: int = 32, *, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """The trace as the mean of v^T A v over random signs v, and its standard error (NaN for one probe).

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990).

    Raises:
        ValueError: `num_probes` < 1.

    Example:
        >>> hutchinson_trace(SymmetricOperator.from_matrix(torch.diag(torch.tensor([1.0, 2.0]))), 4)
        (3.0, 0.0)
    """
    checked_count("num_probes", num_probes)
    random, values = checked_generator(generator), []
    for _ in range(num_probes):
        v = torch.randint(0, 2, (op.size,), generator=random, device=random.device).to("cpu", torch.float64) * 2 - 1
        values.append(v @ op(v))
    found = torch.stack(values)
    return float(found.mean()), float(found.std() / num_probes**0.5) if num_probes > 1 else math.nan


def count_outliers(values: Tensor, most: int = MAX_OUTLIERS) -> tuple[int, float]:
    """How many of the largest eigenvalues stand out: the i that makes value_i / value_{i+1} largest, and that ratio.

    Args:
        values: eigenvalues in any order; those <= 0 are left out.
        most: the largest count to look for.

    Returns:
        The count and the ratio; (0, 1.0) for fewer than two positive values.

    Example:
        >>> count_outliers(torch.tensor([9.0, 8.0, 1.0, 0.9, -7.0]))
        (2, 8.0)
    """
    positive = values[values > 0].sort(descending=True).values[: checked_count("most", most) + 1]
    if len(positive) < 2:
        return 0, 1.0
    ratios = positive[:-1] / positive[1:]
    best = int(ratios.argmax())
    return best + 1, float(ratios[best])


def _known(runs: list[LanczosResult], most: int) -> Tensor:
    """The largest values down to the first that isn't known to 1 %, of the run that knows the most."""
    found = []
    for run in runs:
        values, residuals = run.ritz_values.flip(0)[:most], run.residuals.flip(0)[:most]
        good = (residuals <= 0.01 * values.abs()).long().cumprod(0).bool()
        found.append(values[good])
    return max(found, key=len)


def _density(
    nodes: Tensor, weights: Tensor, low: float, high: float, steps: int, num_points: int, sigma: float | None
) -> tuple[Tensor, Tensor]:
    half = 0.525 * (high - low) or 1e-3 * max(abs(high), 1e-30)
    if sigma is None:
        sigma = half * 2 / (max(steps - 1, 1) * math.sqrt(8 * math.log(_KAPPA)))
    else:
        checked_number("sigma", sigma, above=0)
    middle, reach = (high + low) / 2, max(half, (high - low) / 2 + 4 * sigma)
    grid = torch.linspace(middle - reach, middle + reach, num_points, dtype=torch.float64)
    bumps = torch.exp(-0.5 * ((grid[:, None] - nodes[None, :]) / sigma).square()) / (sigma * math.sqrt(2 * math.pi))
    return grid, bumps @ weights
