"""Slicers: unit vectors, their symmetries, and the amortized distance that they make."""

import math

import pytest
import torch

from trimtab.geometry import AmortizedSlicedWasserstein, AmortizedSlicer, sliced_wasserstein
from trimtab.geometry.slicers import SLICERS

N = 32
INVARIANT = ("attention", "efficient_attention")


def slicer(kind, seed=0):
    torch.manual_seed(seed)
    return AmortizedSlicer(kind, num_points=None if kind in INVARIANT else N, projected_points=8)


def clouds(count=4, points=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, points, 3, generator=generator), torch.randn(count, points, 3, generator=generator) + 1


@pytest.mark.parametrize("kind", SLICERS)
def test_directions_are_unit_vectors_and_a_batch_gives_what_its_items_give(kind):
    x, y = clouds()
    network = slicer(kind)
    direction = network(x, y)
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(network(x[1], y[1]), direction[1])
    direction[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("kind", INVARIANT)
def test_invariant_kinds(kind):
    """Unchanged by the order of points of either cloud, by which comes first, and open to any number of points."""
    x, y = clouds()
    network, order = slicer(kind), torch.randperm(N, generator=torch.Generator().manual_seed(1))
    direction = network(x, y)
    for other in (network(x[:, order], y), network(x, y[:, order]), network(y, x)):
        torch.testing.assert_close(other, direction, rtol=0, atol=1e-5)
    assert network(x[:, :7], y).shape == (4, 3)


@pytest.mark.parametrize("kind", [kind for kind in SLICERS if kind not in INVARIANT])
def test_kinds_with_a_weight_a_point(kind):
    x, y = clouds()
    network, order = slicer(kind), torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert (network(x[:, order], y) - network(x, y)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="the slicer's number of points 32, got 31 and 32"):
        network(x[:, 1:], y)
    with pytest.raises(ValueError, match=f"`num_points` must be given: a {kind} slicer"):
        AmortizedSlicer(kind)


def test_efficient_attention_by_its_formula():
    x, y = clouds()
    network = slicer("efficient_attention")
    layers = network.network

    def pooled(points):
        q, k, v = layers.to_q(points).softmax(-1), layers.to_k(points).softmax(-2), layers.to_v(points)
        return (q @ (k.mT @ v)).mean(1)

    expected = torch.nn.functional.normalize(pooled(x) + pooled(y), dim=1)
    torch.testing.assert_close(network(x, y), expected)


def test_refusals():
    with pytest.raises(ValueError, match="`kind` must be one of linear"):
        AmortizedSlicer("self")
    with pytest.raises(ValueError, match="dimension 3, got 2"):
        AmortizedSlicer()(torch.randn(2, 5, 2), torch.randn(2, 5, 2))
    for kappa in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="`kappa` must be a number > 0"):
            AmortizedSlicedWasserstein(AmortizedSlicer(), kappa=kappa)


def test_a_vanishing_output_gives_an_axis():
    network = AmortizedSlicer()
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 9, 3)
    direction = network(x, -x)
    assert torch.equal(direction, torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]))
    direction.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_saves_and_loads(tmp_path):
    network = slicer("linear_attention")
    network.save_pretrained(tmp_path)
    loaded = AmortizedSlicer.from_pretrained(tmp_path)
    x, y = clouds()
    torch.testing.assert_close(loaded(x, y), network(x, y))


@pytest.mark.parametrize("kappa", [1.0, math.inf])
def test_losses_reach_their_own_side_only(kappa):
    distance = AmortizedSlicedWasserstein(slicer("efficient_attention"), kappa=kappa, num_projections=16)
    x, y = clouds()
    y.requires_grad_()
    loss = distance.loss(x, y, torch.Generator().manual_seed(0))
    loss.backward()
    assert y.grad.abs().sum() > 0 and all(p.grad is None for p in distance.parameters())
    cloud_slope, y.grad = y.grad, None
    adversary = distance.adversary_loss(x, y, torch.Generator().manual_seed(0))
    adversary.backward()
    assert y.grad is None and any(p.grad.abs().sum() > 0 for p in distance.parameters())
    torch.testing.assert_close(adversary, -loss)
    slopes = [p.grad.clone() for p in distance.parameters() if p.grad is not None]
    distance.zero_grad()
    joint = distance.joint_loss(x, y, torch.Generator().manual_seed(0))
    joint.backward()
    torch.testing.assert_close(joint, loss)
    torch.testing.assert_close(y.grad, cloud_slope)
    torch.testing.assert_close([p.grad for p in distance.parameters() if p.grad is not None], slopes)
    if math.isinf(kappa):
        centre = distance.slicer(x, y.detach()).detach()
        torch.testing.assert_close(loss, sliced_wasserstein(x, y, projections=centre[:, None]).mean())


def test_half_precision_clouds():
    distance = AmortizedSlicedWasserstein(slicer("efficient_attention"), num_projections=8)
    x, y = (cloud.bfloat16() for cloud in clouds())
    assert distance.loss(x, y).dtype is torch.bfloat16


def test_amortization_finds_the_direction_of_pairs_it_has_not_seen():
    """Pairs that differ by a shift of length 1: uniform slices give 1/3, the optimum 0.82 at kappa = 10."""
    torch.manual_seed(0)
    distance = AmortizedSlicedWasserstein(AmortizedSlicer(), kappa=10.0, num_projections=20)
    ascent = torch.optim.Adam(distance.slicer.parameters(), lr=1e-2, betas=(0.0, 0.9))
    generator = torch.Generator().manual_seed(0)

    def pairs(count):
        x = torch.randn(count, 64, 3, generator=generator)
        shift = torch.nn.functional.normalize(torch.randn(count, 1, 3, generator=generator), dim=-1)
        x = x - x.mean(1, keepdim=True)
        return x, x.flip(1) + shift

    for _ in range(120):
        ascent.zero_grad()
        distance.adversary_loss(*pairs(16), generator).backward()
        ascent.step()
    with torch.no_grad():
        assert distance.loss(*pairs(200), generator) > 0.45
