"""Figures of the benchmarks against what is known in closed form."""

import math

import numpy as np
import pytest
import torch

from trimtab.benchmarks.figures import frechet_distance, gaussian_of, proportion_interval, ratio_interval


def test_frechet_distance_of_gaussians():
    """Known for Gaussians of one covariance c I and another: (difference of means)^2 + d (sqrt a - sqrt b)^2."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    b = 2 * torch.randn(200_000, 3, generator=generator, dtype=torch.float64) + 1
    assert frechet_distance(a, b) == pytest.approx(3 + 3 * 1, rel=0.02)
    assert frechet_distance(gaussian_of(a), b) == frechet_distance(a, b)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("right", [0, 20, 64])
def test_proportion_interval_is_wilsons(right):
    """(p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)"""
    n, z = 64, 1.959964
    p = right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = ((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))
    assert proportion_interval(right, n) == pytest.approx(expected, abs=1e-6)


def test_ratio_interval_is_that_of_a_mean():
    """With one reference for all, the ratio is a mean, whose interval is known: +-1.96 sd / sqrt(n)."""
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    low, high = ratio_interval(values, np.full(400, 0.5))
    assert low < values.mean() / 0.5 < high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20 / 0.5, rel=0.1)
    assert ratio_interval(values, 2 * values) == pytest.approx((0.5, 0.5))
