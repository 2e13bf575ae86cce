"""The von Mises-Fisher distribution against scipy and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from trimtab.geometry import VonMisesFisher

F64 = torch.float64


def axis(dim, seed=0):
    return torch.nn.functional.normalize(
        torch.randn(dim, generator=torch.Generator().manual_seed(seed), dtype=F64), dim=0
    )


@pytest.mark.parametrize("kappa", [1e-3, 1.0, 10.0, 100.0, 1e5])
def test_moments_in_three_dimensions(kappa):
    """E w = coth k - 1/k and E w^2 = 1 - 2 E w / k, within 4 standard errors of 2e5 draws."""
    mu, count = axis(3), 200_000
    draws = VonMisesFisher(mu, kappa).sample((count,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(draws.norm(dim=1), torch.ones(count, dtype=F64))
    w = draws @ mu
    mean = 1 / math.tanh(kappa) - 1 / kappa
    assert abs(w.mean().item() - mean) < 4 * w.std().item() / math.sqrt(count)
    assert abs(w.square().mean().item() - (1 - 2 * mean / kappa)) < 4 * w.square().std().item() / math.sqrt(count)


@pytest.mark.parametrize("dim", [2, 3, 4, 10, 50])
@pytest.mark.parametrize("kappa", [0.1, 2.0, 50.0])
def test_distribution_equals_scipys(dim, kappa):
    """Kolmogorov-Smirnov on the cosine, and on a coordinate across it."""
    mu = axis(dim)
    ours = VonMisesFisher(mu, kappa).sample((20_000,), generator=torch.Generator().manual_seed(0)).numpy()
    theirs = stats.vonmises_fisher(mu.numpy(), kappa, seed=np.random.default_rng(1)).rvs(20_000)
    across = np.linalg.svd(mu.numpy()[None])[2][1]
    for direction in (mu.numpy(), across, np.eye(dim)[0]):
        assert stats.ks_2samp(ours @ direction, theirs @ direction).pvalue > 1e-3


@pytest.mark.parametrize("dim", [2, 3, 5, 64])
@pytest.mark.parametrize("kappa", [1e-2, 1.0, 30.0, 1000.0])
def test_log_prob_and_entropy_equal_scipys(dim, kappa):
    mu, reference = axis(dim), stats.vonmises_fisher(axis(dim).numpy(), kappa)
    ours = VonMisesFisher(mu, kappa)
    points = torch.stack([axis(dim, seed) for seed in range(1, 6)])
    np.testing.assert_allclose(ours.log_prob(points), reference.logpdf(points.numpy()), rtol=1e-9, atol=1e-9)
    assert ours.entropy().item() == pytest.approx(reference.entropy(), rel=1e-8, abs=1e-8)


def test_high_dimension_and_low_concentration_do_not_underflow():
    """As kappa falls the law becomes uniform: -log of the sphere's area, log 2 + d/2 log pi - lgamma(d/2)."""
    dim = 1000
    area = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
    law = VonMisesFisher(axis(dim), 1e-3)
    assert law.entropy().item() == pytest.approx(area, rel=1e-9)
    assert law.log_prob(axis(dim, 2)).item() == pytest.approx(-area, rel=1e-6)
    assert law.mean.norm().item() == pytest.approx(1e-3 / dim, rel=1e-6)


def test_gradients_of_density_and_moments():
    mu, kappa = axis(3).requires_grad_(), torch.tensor(2.5, dtype=F64, requires_grad=True)
    value = axis(3, 1)
    assert torch.autograd.gradcheck(lambda k: VonMisesFisher(mu, k, validate_args=False).log_prob(value), (kappa,))
    (slope,) = torch.autograd.grad(VonMisesFisher(mu, kappa).log_prob(value), kappa)
    mean = 1 / math.tanh(2.5) - 1 / 2.5
    assert slope.item() == pytest.approx((mu @ value).item() - mean)
    assert torch.autograd.gradcheck(lambda k: VonMisesFisher(mu.detach(), k).mean, (kappa,)) is True


def expected_gradient(mu, t, kappa):
    """Of E (theta . t)^2 = alpha (mu . t)^2 + beta (|t|^2 - (mu . t)^2), on the tangent plane at mu."""
    alpha = 1 - 2 * (1 / math.tanh(kappa) - 1 / kappa) / kappa
    beta = (1 - alpha) / 2
    slope = 2 * (alpha - beta) * (mu @ t) * t
    return slope - (slope @ mu) * mu


def gradient_of_second_moment(draw, mu, t):
    mu = mu.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((draw(mu) @ t).square().mean(), mu)
    return (gradient - (gradient @ mu) * mu).detach()


def householder(mu, w, sphere):
    """The reflection of the first axis onto mu, as the authors of arXiv 2301.04791 write it."""
    first = torch.zeros_like(mu)
    first[0] = 1.0
    u = first - mu
    u = u / (u.norm() + 1e-5)
    draws = torch.cat([w[:, None], (1 - w.square()).clamp_min(1e-10).sqrt()[:, None] * sphere], dim=1)
    return draws - 2 * (draws @ u)[:, None] * u


def test_gradient_in_the_mean_direction_near_the_first_axis():
    """The rotation form is right to 5e-3 where the Householder form is lost in its own variance."""
    t, kappa, count = torch.tensor([0.3, -0.5, 0.8], dtype=F64), 1.0, 400_000
    mu = torch.nn.functional.normalize(torch.tensor([1.0, 1e-3, 0.0], dtype=F64), dim=0)
    expected = expected_gradient(mu, t, kappa)

    def rotation(mu):
        return VonMisesFisher(mu, kappa).rsample((count,), generator=torch.Generator().manual_seed(0))

    def reflection(mu):
        generator = torch.Generator().manual_seed(0)
        uniform = torch.rand(count, generator=generator, dtype=F64)
        w = 1 + torch.log1p(uniform * math.expm1(-2 * kappa)) / kappa
        angle = 2 * math.pi * torch.rand(count, generator=generator, dtype=F64)
        return householder(mu, w, torch.stack([angle.cos(), angle.sin()], dim=1))

    assert (gradient_of_second_moment(rotation, mu, t) - expected).abs().max() < 5e-3
    assert (gradient_of_second_moment(reflection, mu, t) - expected).abs().max() > 0.1
    assert (reflection(mu).norm(dim=1) - 1).abs().max() > 0.005  # not even on the sphere
    assert (rotation(mu).norm(dim=1) - 1).abs().max() < 1e-12


def test_gradients_in_other_dimensions_and_in_the_concentration():
    mu, t = axis(6), axis(6, 3)
    draws = lambda mu: VonMisesFisher(mu, 5.0).rsample((200_000,), generator=torch.Generator().manual_seed(0))  # noqa: E731
    w = draws(mu) @ mu
    alpha = w.square().mean().item()
    slope = 2 * (alpha - (1 - alpha) / 5) * (mu @ t) * t
    assert (gradient_of_second_moment(draws, mu, t) - (slope - (slope @ mu) * mu)).abs().max() < 5e-3

    kappa = torch.tensor(2.0, dtype=F64, requires_grad=True)
    mean = (VonMisesFisher(axis(3), kappa).rsample((400_000,), torch.Generator().manual_seed(0)) @ axis(3)).mean()
    (slope,) = torch.autograd.grad(mean, kappa)
    assert slope.item() == pytest.approx(1 / 4 - 1 / math.sinh(2) ** 2, abs=2e-3)
    with pytest.raises(ValueError, match="for d = 3 only, got d = 6"):
        VonMisesFisher(axis(6), kappa).rsample()


def test_shapes_and_generators():
    mu = torch.stack([axis(4, seed) for seed in range(6)]).reshape(2, 3, 4).float()
    law = VonMisesFisher(mu, torch.tensor([1.0, 10.0, 100.0]))
    assert law.batch_shape == (2, 3) and law.event_shape == (4,)
    draws = law.rsample((5,), generator=torch.Generator().manual_seed(0))
    assert draws.shape == (5, 2, 3, 4) and draws.dtype is torch.float32
    assert torch.equal(draws, law.sample((5,), generator=torch.Generator().manual_seed(0)))
    assert law.log_prob(draws).shape == (5, 2, 3) and law.entropy().shape == (2, 3)
    assert law.expand((7, 2, 3)).sample().shape == (7, 2, 3, 4)
    with pytest.raises(ValueError, match="support"):
        law.log_prob(2 * draws)
