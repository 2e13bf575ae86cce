"""Mixtures as guides: densities and moments, unbiased gradients by quadrature, posteriors in closed form."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from trimtab.optim import MixtureGuide, elbo, estimate, fit_mixture, spread_starts


def gaussian_likelihood(a, y, level):
    """log N(y; A z, level^2 I)."""

    def log_likelihood(z):
        return Normal(z @ a.T, level).log_prob(y).sum(1)

    return log_likelihood


def linear_posterior(a, y, level):
    """Mean, covariance and log-evidence of z ~ N(0, I) given y = A z + noise."""
    a, y = a.double(), y.double()
    covariance = torch.linalg.inv(torch.eye(a.shape[1]) + a.T @ a / level**2)
    evidence = MultivariateNormal(torch.zeros(len(y)).double(), a @ a.T + level**2 * torch.eye(len(y)))
    return covariance @ a.T @ y / level**2, covariance, float(evidence.log_prob(y))


def test_a_linear_generators_posterior_is_found_exactly():
    a, y, level = torch.diag(torch.tensor([2.0, 1.0, 0.5]))[:2], torch.tensor([1.5, -1.0]), 0.5
    mean, covariance, evidence = linear_posterior(a, y, level)
    guide = MixtureGuide((3,), 1, scale=0.5)
    found = fit_mixture(gaussian_likelihood(a, y, level), guide, num_steps=150, num_samples=4, lr=0.1)
    assert guide.mean[0].tolist() == pytest.approx(mean.tolist(), abs=0.01)
    assert guide.scale[0].tolist() == pytest.approx(covariance.diag().sqrt().tolist(), rel=0.01)
    assert found.bound == pytest.approx(evidence, abs=1e-3)  # no gap: the posterior is in the family
    assert found.ess == pytest.approx(4, abs=0.01) and found.num_evaluations == 600
    assert len(found.history) == 150 and found.stopped is None


def test_low_rank_finds_what_diagonal_cannot():
    a, y, level = torch.tensor([[1.0, 1.0, -1.0]]), torch.tensor([1.0]), 0.3
    mean, covariance, evidence = linear_posterior(a, y, level)
    # The best diagonal Gaussian has the precision's diagonal, and loses half the log of the ratio of determinants.
    lost = 0.5 * float(torch.linalg.inv(covariance).diag().log().sum() + torch.logdet(covariance))
    guide = MixtureGuide((3,), 1, family="lowrank", rank=2, scale=0.4)
    found = fit_mixture(gaussian_likelihood(a, y, level), guide, num_steps=200, num_samples=4, lr=0.1)
    assert lost > 1 and found.bound == pytest.approx(evidence, abs=0.05)
    assert guide.mean[0].tolist() == pytest.approx(mean.tolist(), abs=0.05)
    full = guide.factor[0] @ guide.factor[0].T + torch.diag(guide.scale[0].square())
    assert torch.allclose(full.double(), covariance, atol=0.08)


def two_points(z):
    """Two rewarded points (+-2, 0) of width 1/2: log Z by convolution of Gaussians, each half of it."""
    places = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    return Independent(Normal(places, 0.5), 1).log_prob(z[:, None]).logsumexp(1) - math.log(2)


def test_a_mixture_has_both_modes_and_one_component_loses_log_two():
    log_z = float(Independent(Normal(torch.zeros(2), 1.25**0.5), 1).log_prob(torch.tensor([2.0, 0.0])))
    starts = torch.tensor([[1.0, 0.5], [-1.0, 0.5]])
    gaps = []
    for count in (1, 2):
        guide = MixtureGuide((2,), count, means=starts[:count], scale=0.5)
        gaps.append(fit_mixture(two_points, guide, num_steps=120, lr=0.1).bound - log_z)
    assert gaps[0] == pytest.approx(-math.log(2), abs=0.05) and gaps[1] == pytest.approx(0, abs=0.02)
    assert sorted(guide.modes()[:, 0].tolist()) == pytest.approx([-1.6, 1.6], abs=0.05)
    seen = guide.sample(10, torch.Generator().manual_seed(0))
    assert int((seen[:, 0] > 0).sum()) == 5  # systematic: in their shares


@pytest.mark.parametrize("strategy", ["enum", "reinforce"])
def test_gradients_are_those_of_the_integral(strategy):
    """E_q[log p - log q] of one dimension on a grid, differentiated by torch, beside the mean of 150 surrogates."""
    guide = MixtureGuide((1,), 2, means=torch.tensor([[-0.6], [0.9]]), scale=0.7, strategy=strategy)
    with torch.no_grad():
        guide.logits.copy_(torch.tensor([0.4, -0.3]))

    def log_target(z):
        return -0.5 * z.double().square().sum(1) + torch.cos(2 * z.double()).sum(1)

    grid = torch.linspace(-8, 8, 4001).double()[:, None]
    log_q = guide.log_prob(grid.float())
    exact = (log_q.exp() * (log_target(grid) - log_q)).sum() * (16 / 4000)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(exact, [guide.logits, guide.mean, guide.log_scale])])
    program, generator, rows, values = (
        elbo(lambda c: log_target(c["z"]), guide),
        torch.Generator().manual_seed(0),
        [],
        [],
    )
    for _ in range(150):
        found = estimate(program, num_samples=20, generator=generator, vectorized=True)
        gradient = torch.autograd.grad(found.surrogate, [guide.logits, guide.mean, guide.log_scale])
        rows.append(torch.cat([g.flatten() for g in gradient]).double())
        values.append(found.value)
    rows = torch.stack(rows)
    z = (rows.mean(0) - wanted).abs() / (rows.std(0) / 150**0.5)
    assert float(z.max()) < 4, z
    assert float(torch.stack(values).mean()) == pytest.approx(float(exact.detach()), abs=0.03)


@pytest.mark.parametrize("family", ["diagonal", "lowrank"])
def test_densities_are_torchs_and_draws_have_their_moments(family):
    generator = torch.Generator().manual_seed(1)
    guide = MixtureGuide((2, 2), 3, family=family, rank=2, means=torch.randn(3, 2, 2, generator=generator), scale=0.6)
    with torch.no_grad():
        guide.logits.copy_(torch.tensor([0.2, -0.5, 1.0]))
        guide.factor.copy_(0.5 * torch.randn(guide.factor.shape, generator=generator))
    covariance = guide.factor @ guide.factor.mT + torch.diag_embed(guide.scale.square())
    parts = MultivariateNormal(guide.mean.double(), covariance.double())
    exact = MixtureSameFamily(Categorical(logits=guide.logits.double()), parts)
    z = guide.sample(20_000, generator)
    assert z.shape == (20_000, 2, 2) and z.dtype == torch.float32
    assert torch.allclose(guide.log_prob(z[:50]), exact.log_prob(z[:50].flatten(1).double()), atol=1e-5)
    flat = z.flatten(1).double()
    assert torch.allclose(flat.mean(0), exact.mean, atol=0.04)
    assert torch.allclose(flat.var(0), exact.variance, rtol=0.05)
    alike = guide.sample(4, torch.Generator().manual_seed(0)), guide.sample(4, torch.Generator().manual_seed(0))
    assert torch.equal(*alike)


def test_starts_are_the_best_and_then_the_farthest():
    generator = torch.Generator().manual_seed(0)
    points, values = torch.randn(30, 3, generator=generator), torch.randn(30, generator=generator)
    values[4] = float("nan")
    found = spread_starts(points, values, 4, 10)
    finite = [i for i in range(30) if i != 4]
    pool = sorted(finite, key=lambda i: -float(values[i]))[:10]
    wanted = [pool[0]]
    while len(wanted) < 4:
        rest = [i for i in pool if i not in wanted]
        wanted.append(max(rest, key=lambda i: min(float((points[i] - points[j]).norm()) for j in wanted)))
    assert found == wanted
    with pytest.raises(ValueError, match="`count` is 4, `pool` 3"):
        spread_starts(points, values, 4, 3)


def test_a_fit_ends_well():
    def broken(after):
        calls = []

        def log_likelihood(z):
            calls.append(1)
            return z.sum(1) * (float("nan") if len(calls) > after else 1.0)

        return log_likelihood

    with pytest.raises(FloatingPointError, match="step 0"):
        fit_mixture(broken(0), MixtureGuide((2,), 2))
    guide = MixtureGuide((2,), 2)
    with pytest.warns(RuntimeWarning, match="not finite at step 3"):
        found = fit_mixture(broken(6), guide, num_steps=9)  # two components a step
    assert found.stopped and len(found.history) == 3 and bool(torch.isfinite(guide.mean).all())

    seen = []
    found = fit_mixture(broken(99), guide, num_steps=9, callback=lambda step, bound: seen.append(step) or step == 2)
    assert seen == [0, 1, 2] and len(found.history) == 3 and "callback" in found.stopped

    def interrupting(step, bound):
        def raises(z):
            if seen.append(0) or len(seen) > 8:
                raise KeyboardInterrupt
            return z.sum(1)

        return raises

    found = fit_mixture(interrupting(0, 0), guide, num_steps=9)
    assert "interrupted" in found.stopped and 0 < len(found.history) < 9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_components": 0}, "num_components"),
        ({"family": "full"}, "family"),
        ({"strategy": "mvd"}, "strategy"),
        ({"scale": 0.0}, "scale"),
        ({"means": torch.zeros(3, 2)}, "means"),
        ({"family": "lowrank", "rank": 0}, "rank"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=f"`{words}`"):
        MixtureGuide((2,), **{"num_components": 2, **arguments})
