"""G2RL: features against autograd, scores in closed form, bounds and invariances, and where it is blind."""

import math

import pytest
import torch
from torch import nn

from trimtab.optim import (
    LastLayerFeature,
    exploration_score,
    gradient_guided_advantages,
    gradient_guided_rewards,
    group_advantages,
    last_layer_gradient,
    token_sensitivity,
)

E1, E2, E3 = torch.eye(3)


@pytest.mark.parametrize("chunk", [1024, 3])
def test_token_sensitivity_is_the_likelihood_s_gradient(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    tokens = torch.randint(9, (4, 5), generator=generator)
    mask = torch.arange(5)[None] < torch.tensor([[5], [2], [4], [1]])
    logits = hidden @ weight.T
    mean = (logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] * mask).sum(1) / mask.sum(1)
    expected = torch.autograd.grad(mean.sum(), hidden)[0].sum(1)
    found = token_sensitivity(logits.detach(), tokens, weight, mask, chunk=chunk)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    whole = token_sensitivity(logits.detach(), tokens, weight, mask, top_k=9)
    torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-12)


def test_last_layer_gradient_is_autograd_s():
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(5, 3).double()
    hidden = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    target = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    with LastLayerFeature(layer) as feature:
        outputs = [layer(hidden), layer(2 * hidden)]
    found = feature.features([outputs[0] - target, outputs[1] - target])
    for row in range(2):
        loss = sum(0.5 * (output[row] - target[row]).square().sum() for output in outputs) / 2
        expected = torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].flatten()
        torch.testing.assert_close(found[row], expected, rtol=1e-10, atol=1e-10)
    projection = torch.randn(15, 4, generator=generator, dtype=torch.float64)
    first = last_layer_gradient(outputs[0] - target, hidden, projection=projection)
    torch.testing.assert_close(first, last_layer_gradient(outputs[0] - target, hidden) @ projection)
    layer(hidden)
    assert len(feature.inputs) == 2  # the hook is gone


def score(features, rewards=(0.0, 0.0, 0.0), **options):
    return exploration_score(torch.stack(features), torch.tensor(rewards), [0] * len(features), **options).tolist()


def test_scores_in_closed_form():
    assert score([E1, 2 * E1, 3 * E1]) == pytest.approx([0, 0, 0], abs=1e-6)
    assert score([E1, E2, E3]) == pytest.approx([1, 1, 1], abs=1e-6)
    assert score([E1, E1, E2], reference="uniform") == pytest.approx([0.5**0.5, 0.5**0.5, 1], abs=1e-6)
    low, high = math.exp(-1), math.exp(1)
    share = low / (low + high)  # on the second of rows (1, 2), whose feature differs
    assert score([E1, E2, E1], (1.0, -1.0, 1.0))[0] == pytest.approx(share**0.5, abs=1e-6)
    assert share**0.5 == pytest.approx(0.3453, abs=1e-4)
    assert score([E1, E2, E1], (1.0, -1.0, 1.0), root=False)[0] == pytest.approx(share, abs=1e-6)
    assert score([E1, E2, E1], (1.0, -1.0, 1.0), reference="success")[:2] == pytest.approx([0, 1], abs=1e-6)
    assert score([E1, -E1, E2], reference="uniform", signed=True) == pytest.approx([1, 1, 1], abs=1e-6)
    assert score([E1, 0 * E1, E1]) == pytest.approx([0, 0, 0], abs=1e-6)  # no gradient: neither scored nor a reference


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(24, 6, generator=generator, dtype=torch.float64)
    rewards = torch.where(torch.rand(24, generator=generator) < 0.5, -1.0, 1.0)
    groups = torch.arange(24) % 3
    return features, rewards, groups, generator


def test_bounds_and_signs():
    features, rewards, groups, _ = batch()
    for options in ({}, {"strength": 5.0}, {"transform": "minmax"}, {"transform": "signed"}):
        found = gradient_guided_rewards(rewards, features, groups, **options)
        assert bool(((found.score >= 0) & (found.score <= 1)).all()) and float(found.rewards.abs().max()) <= 3
        assert bool((found.rewards * rewards >= 0).all())
    plain = gradient_guided_rewards(rewards, features, groups)
    torch.testing.assert_close(plain.rewards, rewards * (1 + plain.score))
    coupled = gradient_guided_rewards(rewards, features, groups, coupled=True)
    torch.testing.assert_close(coupled.rewards, rewards + plain.score)


def test_strength_zero_is_grpo_to_the_bit():
    features, rewards, groups, _ = batch()
    found = gradient_guided_advantages(rewards, features, groups, strength=0.0)
    assert torch.equal(found, group_advantages(rewards, groups, std=True, eps=1e-4))


def test_strength_cancels_where_rewards_are_equal():
    """Division by the deviation undoes the bound, which normalize='none' keeps."""
    features, _, groups, _ = batch()
    rewards = torch.ones(24)
    half, double = (gradient_guided_advantages(rewards, features, groups, strength=s) for s in (0.5, 2.0))
    torch.testing.assert_close(half, double, rtol=0.01, atol=0.01)
    half, double = (
        gradient_guided_advantages(rewards, features, groups, strength=s, normalize="none") for s in (0.5, 1.0)
    )
    torch.testing.assert_close(2 * half, double, rtol=1e-4, atol=1e-5)


def test_invariances():
    features, rewards, groups, generator = batch()
    expected = exploration_score(features, rewards, groups)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    torch.testing.assert_close(
        exploration_score(7 * features @ rotation, rewards, groups), expected, rtol=1e-6, atol=1e-6
    )
    order = torch.randperm(24, generator=generator)
    torch.testing.assert_close(
        exploration_score(features[order], rewards[order], 10 - groups[order]), expected[order], rtol=1e-6, atol=1e-6
    )


def test_gaussian_chains_have_no_direction_of_their_own():
    """The sensitivity of an on-policy Gaussian step is its own noise: independent samples are all new to each other."""
    features = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    found = gradient_guided_rewards(torch.ones(8), features, [0] * 8)
    assert abs(found.similarity_mean) < 0.03 and float(found.score.min()) > 0.999


def test_matching_loss_tells_clusters_apart():
    generator = torch.Generator().manual_seed(0)
    body = nn.Sequential(nn.Linear(9, 32), nn.Tanh(), layer := nn.Linear(32, 8))
    centres = 2 * torch.randn(2, 6, 8, generator=generator)
    clusters = torch.tensor([0] * 6 + [1] * 2)
    samples = centres[clusters] + 0.3 * torch.randn(8, 6, 8, generator=generator)
    residuals = []
    with LastLayerFeature(layer) as feature, torch.no_grad():
        for level in range(16):
            sigma, noise = (level + 0.5) / 16, torch.randn(1, 6, 8, generator=generator)
            x = (1 - sigma) * samples + sigma * noise
            times = torch.full((8, 6, 1), sigma)
            residuals.append(body(torch.cat([x, times], 2)) - (noise - samples))
    units = nn.functional.normalize(feature.features(residuals), dim=1)
    cosines = units @ units.T
    same = clusters[:, None] == clusters[None]
    assert float(cosines[same].min()) > 0.8 and float(cosines[~same].abs().max()) < 0.35
    assert float(cosines[~same].abs().mean()) < 0.2
    found = exploration_score(units, torch.zeros(8), [0] * 8)
    assert float(found[:6].max()) < float(found[6:].min())


def test_refuses_and_warns():
    features, rewards, groups, _ = batch()
    with pytest.raises(ValueError, match="`features` has shape"):
        exploration_score(features[:3], rewards, groups)
    with pytest.raises(ValueError, match="a group of one"):
        exploration_score(features[:3], rewards[:3], [0, 0, 1])
    assert float(exploration_score(features[:3], rewards[:3], [0, 0, 1], allow_singletons=True)[2]) == 1
    with pytest.raises(ValueError, match="in row 2 that are not finite"):
        exploration_score(features.index_fill(0, torch.tensor([2]), math.nan), rewards, groups)
    for options in ({"strength": -1.0}, {"clip": 0.0}, {"transform": "rank"}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
            gradient_guided_rewards(rewards, features, groups, **options)
    with pytest.warns(UserWarning, match="all positive"):
        gradient_guided_rewards(rewards + 5, features, groups)
    centred = gradient_guided_rewards(rewards + 5, features, groups, center=True, strength=0.0)
    assert float(centred.rewards.abs().max()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="`weight`"):
        token_sensitivity(torch.zeros(1, 2, 5), torch.zeros(1, 2, dtype=torch.long), torch.zeros(4, 3))
    with pytest.raises(TypeError, match="`module`"):
        LastLayerFeature(nn.ReLU())
