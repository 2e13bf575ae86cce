"""Worst-case weights of several rewards: the smallest gain rises, each sample by itself."""

import math

import pytest
import torch

from tests.pipelines.test_noise_optimization_loop import SHAPE, Identity, seeded
from trimtab.pipelines.noise_objective import NoiseObjective
from trimtab.pipelines.noise_optimizers import NoiseProblem, make_noise_optimizer
from trimtab.pipelines.noise_run import NoiseRun
from trimtab.pipelines.noise_weights import WorstCaseWeights
from trimtab.rewards import CallableReward, WeightedReward


def conflicting(weighting="worst-case", weights=(1.0, 1.0, 1.0), differentiable=True):
    """Each wants the noise at a target of its own, one of them in small units."""
    targets = [torch.randn(SHAPE, generator=seeded(10 + i)) for i in range(3)]
    rewards = [
        CallableReward(lambda x, p, t=t, s=s: -s * (x - t).square().mean((1, 2, 3)), differentiable, name=f"r{i}")
        for i, (t, s) in enumerate(zip(targets, (1.0, 0.2, 3.0), strict=True))
    ]
    return WeightedReward(list(zip(rewards, weights, strict=True)), weighting=weighting)


def start(rows=range(2)):
    return torch.stack([torch.randn(SHAPE, generator=seeded(row)) for row in rows])


def run(reward, latents, steps=120, optimizer="gradient", **settings):
    objective = NoiseObjective(Identity(), reward, ["a"] * len(latents))
    generators = [seeded(100 + row) for row in range(len(latents))]
    problem = NoiseProblem(latents, steps, lambda: torch.randn(latents.shape, generator=generators[0]), generators)
    return list(NoiseRun(objective, make_noise_optimizer(optimizer, problem, settings), steps))


def smallest_gain(reward, found, latents):
    after, before = (reward(z, "a", return_terms=True)[1] for z in (found, latents))
    return torch.stack([after[name] - before[name] for name in after]).amin(0)


def test_the_value_is_the_smallest_scaled_reward():
    reward = conflicting(weights=(1.0, 2.0, -0.5))
    x = start()
    value, terms = reward(x, "a", return_terms=True)
    assert torch.allclose(value, torch.stack([terms["r0"], 2 * terms["r1"], -0.5 * terms["r2"]]).amin(0))


def test_no_reward_is_sacrificed():
    latents, reward = start(), conflicting()
    states = run(reward, latents)
    last = states[-1]
    ours = smallest_gain(reward, last.best_latents, latents)
    assert torch.allclose(last.best_rewards, ours, atol=1e-5) and states[0].rewards.tolist() == [0.0, 0.0]
    for weights in ((1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        fixed = conflicting("sum", weights)
        found = run(fixed, latents)[-1].best_latents
        assert (ours > smallest_gain(reward, found, latents)).all()


def test_the_result_is_near_the_best_that_there_is():
    """On the sphere gains are linear in z, so the best smallest gain is a small problem for a grid of directions."""
    latents, reward = start(rows=[0]), conflicting()
    ours = run(reward, latents, 400, lr=0.01)[-1].best_rewards.item()
    targets = torch.stack([torch.randn(SHAPE, generator=seeded(10 + i)).flatten() for i in range(3)])
    grid = [(i / 200, j / 200) for i in range(201) for j in range(201 - i)]
    weights = torch.tensor([(a, b, 1 - a - b) for a, b in grid]) * torch.tensor([1.0, 0.2, 3.0])
    pulls = weights @ targets
    points = (latents.norm() * pulls / pulls.norm(dim=1, keepdim=True)).view(-1, *SHAPE)
    best = smallest_gain(reward, points, latents).max().item()
    assert ours == pytest.approx(best, rel=0.03)


def test_a_batch_gives_what_its_items_give():
    latents = start()
    both = run(conflicting(), latents, 20)[-1]
    for row in range(2):
        alone = run(conflicting(), latents[row : row + 1], 20)[-1]
        assert torch.allclose(alone.best_latents[0], both.best_latents[row], atol=1e-6)
        assert torch.allclose(alone.best_rewards[0], both.best_rewards[row], atol=1e-6)


def test_a_search_without_gradients_raises_the_smallest_gain():
    latents, reward = start(), conflicting(differentiable=False)
    last = run(reward, latents, 20, "consensus")[-1]
    assert (last.best_rewards > 0).all()
    assert torch.allclose(last.best_rewards, smallest_gain(reward, last.best_latents, latents), atol=1e-5)


def test_weights_go_on_from_their_state_and_follow_the_smallest_gain():
    weights, again = (WorstCaseWeights({"a": 1.0, "b": 2.0}, 1) for _ in range(2))
    ones = {"a": torch.ones(1), "b": torch.ones(1)}
    weights(ones, [0], True)
    for _ in range(20):
        climbed, worth = weights({"a": torch.tensor([2.0]), "b": torch.tensor([0.5])}, [0], True)
    assert worth.item() == -1.0 and climbed.item() == pytest.approx(2 * 0.5, abs=1e-2)  # all weight on b, of scale 2
    again.load_state_dict(weights.state_dict())
    for w in (weights, again):
        assert w({"a": torch.tensor([0.0]), "b": torch.tensor([4.0])}, [0], True)[1].item() == -1.0
    assert torch.equal(weights.players[0].predict(), again.players[0].predict())
    with pytest.raises(ValueError, match="`state`"):
        WorstCaseWeights({"a": 1.0, "b": 2.0}, 2).load_state_dict(weights.state_dict())


def test_a_reward_that_is_not_finite_ends_its_sample_alone():
    def broken(x, prompts):
        values = x.mean((1, 2, 3))
        return torch.where(torch.arange(len(x)) == 1, math.nan, values)

    reward = WeightedReward([(CallableReward(broken, True, name="a"), 1.0),
                             (CallableReward(lambda x, p: -x.mean((1, 2, 3)) ** 2, True, name="b"), 1.0)],
                            weighting="worst-case")  # fmt: skip
    last = run(reward, start(), 3)[-1]
    assert last.stopped[0] is None and "not finite" in last.stopped[1]


def test_bad_input_is_named():
    rewards = [(CallableReward(lambda x, p: x.mean((1, 2, 3)), name=name), 1.0) for name in "ab"]
    with pytest.raises(ValueError, match="`weighting`"):
        WeightedReward(rewards, weighting="minimum")
    for pairs in (rewards[:1], [rewards[0], (rewards[1][0], 0.0)]):
        with pytest.raises(ValueError, match="'worst-case' takes at least two"):
            WeightedReward(pairs, weighting="worst-case")
