"""Figures that several benchmarks measure, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["frechet_distance", "gaussian_of", "proportion_interval", "ratio_interval"]

Gaussian = tuple[torch.Tensor, torch.Tensor]
"""Mean (d,) and covariance (d, d), float64."""


def gaussian_of(sample: torch.Tensor) -> Gaussian:
    """The mean and covariance of a sample (N, d)."""
    sample = sample.double()
    return sample.mean(0), torch.cov(sample.T)


def frechet_distance(a: Gaussian | torch.Tensor, b: Gaussian | torch.Tensor) -> float:
    """||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    Args:
        a: a sample (N, d), or its ``gaussian_of``. A small sample is a little farther from everything than a large
            one of the same distribution: compare samples of one size only.
        b: the same.
    """
    (mean_a, cov_a), (mean_b, cov_b) = (gaussian_of(x) if isinstance(x, torch.Tensor) else x for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def proportion_interval(right: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a proportion of ``right`` in ``count``.

    Example:
        >>> [round(bound, 3) for bound in proportion_interval(8, 10)]
        [0.49, 0.943]
    """
    from scipy.stats import binomtest

    interval = binomtest(right, count).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def ratio_interval(
    values: Sequence[float], references: Sequence[float], confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap, over pairs and seeded, of the mean of ``values`` over that of ``references``.

    Example:
        >>> low, high = ratio_interval([1.0, 1.2, 0.9, 1.1], [1.0, 1.0, 1.0, 1.0])
        >>> 0.9 <= low < 1.05 < high <= 1.2
        True
    """
    pairs = np.stack([np.asarray(values, float), np.asarray(references, float)])
    rows = np.random.default_rng(0).integers(pairs.shape[1], size=(resamples, pairs.shape[1]))
    top, bottom = pairs[:, rows].mean(-1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(top / bottom, [tail, 100 - tail])
    return float(low), float(high)
