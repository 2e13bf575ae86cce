"""Max-sliced and distributional sliced Wasserstein against closed forms and each other."""

import math

import ot
import pytest
import torch

from trimtab.geometry import (
    distributional_sliced_wasserstein,
    earth_movers_distance,
    max_sliced_wasserstein,
    sliced_wasserstein,
)
from trimtab.geometry.optimized_slices import slices_around


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def alpha(kappa):
    """E (epsilon . theta)^2 under vMF(epsilon, kappa) in three dimensions."""
    return 1 - 2 * (1 / math.tanh(kappa) - 1 / kappa) / kappa


def stretched(count=256):
    """A cloud of axis scales (1, .2, .2), turned; its second moments and their first eigenvector."""
    x = torch.randn(count, 3, generator=generator()) * torch.tensor([1.0, 0.2, 0.2])
    x = x @ torch.linalg.qr(torch.randn(3, 3, generator=generator(1))).Q.T
    values, vectors = torch.linalg.eigh(x.T @ x / count)
    return x, values, vectors[:, -1]


def test_max_sliced_of_a_shift_and_of_a_scaling():
    """|t|^2 along t; (s - 1)^2 lambda_max along the first eigenvector."""
    x, values, first = stretched()
    t = torch.tensor([0.6, -1.0, 1.6])
    cost, direction = max_sliced_wasserstein(x, x + t, return_direction=True, generator=generator())
    assert cost.item() == pytest.approx(t.square().sum().item(), rel=1e-3)
    assert abs(direction @ t).item() == pytest.approx(t.norm().item(), rel=1e-3)
    cost, direction = max_sliced_wasserstein(x, 1.5 * x, return_direction=True, generator=generator())
    assert cost.item() == pytest.approx(0.25 * values[-1].item(), rel=1e-3)
    assert abs(direction @ first) > 0.999


@pytest.mark.parametrize("kappa", [1.0, 10.0])
def test_distributional_of_a_shift_and_of_a_scaling(kappa):
    """|t|^2 alpha, and (s - 1)^2 (alpha lambda_max + beta (tr S - lambda_max)), beta = (1 - alpha) / 2."""
    x, values, first = stretched()
    t = torch.tensor([0.6, -1.0, 1.6])

    def measured(y):
        options = {"num_projections": 1000, "steps": 10, "return_direction": True}
        _, centre = distributional_sliced_wasserstein(x, y, kappa=kappa, generator=generator(), **options)
        options = {"num_projections": 20_000, "steps": 0, "direction": centre}
        return distributional_sliced_wasserstein(x, y, kappa=kappa, generator=generator(1), **options).item(), centre

    cost, centre = measured(x + t)
    assert cost == pytest.approx(t.square().sum().item() * alpha(kappa), rel=0.03)
    assert abs(centre @ t) / t.norm() > 0.99
    cost, centre = measured(1.5 * x)
    beta = (1 - alpha(kappa)) / 2
    expected = 0.25 * (alpha(kappa) * values[-1] + beta * (values.sum() - values[-1]))
    assert cost == pytest.approx(expected.item(), rel=0.03)
    assert abs(centre @ first) > 0.99


def test_kappa_goes_from_sliced_to_max_sliced():
    x, y = (torch.randn(1, 128, 3, generator=generator(seed)) for seed in (0, 1))
    y = y * torch.tensor([2.0, 1.0, 0.5])
    low = distributional_sliced_wasserstein(x, y, kappa=1e-6, num_projections=6000, steps=0, generator=generator())
    sliced = sliced_wasserstein(x, y, num_projections=6000, directions="quasi", generator=generator())
    assert low.item() == pytest.approx(sliced.item(), rel=0.03)
    best, direction = max_sliced_wasserstein(x, y, return_direction=True, generator=generator())
    high = distributional_sliced_wasserstein(x, y, kappa=1e7, direction=direction, steps=0, num_projections=50)
    assert high.item() == pytest.approx(best.item(), rel=1e-3)


def test_the_distances_are_ordered():
    """SW <= v-DSW <= Max-SW <= W_2 (and SW^2 <= W_2^2 / d) on 20 random pairs, with 2 % for the draws."""
    x = torch.randn(20, 128, 3, generator=generator())
    scale = 0.5 + torch.rand(20, 1, 3, generator=generator(1))
    y = torch.randn(20, 128, 3, generator=generator(2)) * scale + 0.5 * torch.randn(20, 1, 3, generator=generator(3))
    sliced = sliced_wasserstein(x, y, num_projections=3000, directions="quasi", generator=generator())
    most = max_sliced_wasserstein(x, y, generator=generator())
    exact = earth_movers_distance(x, y, p=2)
    for kappa in (1.0, 10.0):
        options = {"kappa": kappa, "num_projections": 500, "steps": 10, "generator": generator()}
        between = distributional_sliced_wasserstein(x, y, **options)
        assert (sliced <= 1.02 * between).all() and (between <= 1.02 * most).all()
    assert (most <= 1.0001 * exact).all() and (sliced <= 1.02 * exact / 3).all()
    reference = [ot.emd2([], [], ot.dist(a, b)).item() for a, b in zip(x.double(), y.double(), strict=True)]
    torch.testing.assert_close(exact, torch.tensor(reference), rtol=1e-5, atol=1e-6)


def test_max_sliced_is_at_least_every_direction_it_starts_from():
    """POT's max over the same random directions is a lower bound."""
    x, y = torch.randn(1, 100, 5, generator=generator()), torch.randn(1, 90, 5, generator=generator(1))
    from trimtab.geometry import sample_directions

    theta = sample_directions(50, 5, generator=generator(2))
    start = ot.max_sliced_wasserstein_distance(x[0], y[0], projections=theta.T)
    ours = max_sliced_wasserstein(x, y, num_projections=50, generator=generator(2), root=True)
    assert ours.item() >= start.item() - 1e-6
    none = max_sliced_wasserstein(x, y, num_projections=50, steps=0, generator=generator(2), root=True)
    assert none.item() == pytest.approx(start.item(), rel=1e-5)


@pytest.mark.parametrize("distance", [max_sliced_wasserstein, distributional_sliced_wasserstein])
def test_gradients_are_those_of_the_final_slices(distance):
    x, y = (torch.randn(2, 50, 3, generator=generator(seed)).requires_grad_() for seed in (0, 1))
    value, centre = distance(x, y, steps=3, return_direction=True, generator=generator())
    assert value.shape == (2,) and centre.shape == (2, 3) and not centre.requires_grad
    gradients = torch.autograd.grad(value.sum(), (x, y))
    if distance is max_sliced_wasserstein:
        expected = sliced_wasserstein(x, y, projections=centre[:, None])
        torch.testing.assert_close(value, expected)
        for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sum(), (x, y)), strict=True):
            torch.testing.assert_close(gradient, wanted)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("distance", [max_sliced_wasserstein, distributional_sliced_wasserstein])
def test_a_batch_gives_what_its_items_give(distance):
    x, y = torch.randn(3, 40, 3, generator=generator()), torch.randn(3, 30, 3, generator=generator(1))
    batch = distance(x, y, steps=5, generator=generator(4))
    for i in range(3):
        torch.testing.assert_close(
            distance(x[i], y[i], steps=5, generator=generator(4)), batch[i], rtol=1e-3, atol=1e-5
        )


def test_weights_and_one_dimension():
    x, y = torch.randn(2, 20, 3, generator=generator()), torch.randn(2, 20, 3, generator=generator(1))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[:, 15:] = False
    for distance in (max_sliced_wasserstein, distributional_sliced_wasserstein):
        masked = distance(x, y, x_weights=mask, steps=5, generator=generator())
        torch.testing.assert_close(masked, distance(x[:, :15], y, steps=5, generator=generator()), rtol=1e-4, atol=1e-6)
        flat = distance(x[..., :1], y[..., :1], p=1)
        torch.testing.assert_close(flat, earth_movers_distance(x[..., :1], y[..., :1]))


def test_slices_around_share_their_noise():
    centre = torch.nn.functional.normalize(torch.randn(4, 3, generator=generator()), dim=1)
    theta = slices_around(centre, 5.0, 10, generator(1))
    assert theta.shape == (4, 10, 3)
    torch.testing.assert_close(theta[2:3], slices_around(centre[2:3], 5.0, 10, generator(1)))
