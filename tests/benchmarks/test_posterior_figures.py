"""What the benchmarks of posteriors, programs and protection compute, beside slower ways to the same."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal

from trimtab.benchmarks.optim import noise_posterior, programmable_inference, unlearnable_examples


def test_diversity_is_the_mean_over_pairs():
    found = torch.nn.functional.normalize(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), dim=1)
    pairs = [1 - float(found[i] @ found[j]) for i, j in itertools.combinations(range(5), 2)]
    assert noise_posterior.diversity(found) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_the_two_points_evidence_is_the_integral():
    """By importance sampling from the posterior's own components, whose weights are then all the same."""
    z = 0.8 * torch.tensor([2.0, 1.0] + [0.0] * 14) + 0.2**0.5 * torch.randn(
        500, 16, generator=torch.Generator().manual_seed(0)
    )
    half = Normal(0.8 * torch.tensor([2.0, 1.0] + [0.0] * 14), 0.2**0.5).log_prob(z).sum(1) - math.log(2)
    other = Normal(0.8 * torch.tensor([-2.0, 1.0] + [0.0] * 14), 0.2**0.5).log_prob(z).sum(1) - math.log(2)
    log_w = Normal(0.0, 1.0).log_prob(z).sum(1) + noise_posterior.two_points(z) - torch.logaddexp(half, other)
    assert log_w.tolist() == pytest.approx([noise_posterior.LOG_Z] * 500, abs=1e-3)
    assert pytest.approx(-14.875503, abs=1e-6) == noise_posterior.LOG_Z


def test_the_compiled_step_is_the_one_by_hand():
    assert programmable_inference.same_value() < 1e-6


@pytest.mark.parametrize("name", ["random signs", "error-minimising noise"])
def test_cloaks_stay_within_the_bound_after_rounding(name):
    (x, y), _ = unlearnable_examples.gaussians(0, 40)
    cloaked = unlearnable_examples.CLOAKS[name](x, y, 8 / 255, 0)
    levels = (cloaked - x).abs() * 255
    assert torch.equal((cloaked * 255).round() / 255, cloaked) and 4 < float(levels.max()) <= 8 + 1e-3
