"""The gate between demonstrations and rollouts, and what it reaches against its parts."""

import pytest
import torch

from trimtab.optim import HybridGate, RewardThreshold, RunningRewardStats, group_advantages, hybrid_loss
from trimtab.optim.policy.hybrid import SOFT_TABLE

COUNTS = torch.full((9,), 8)


@pytest.mark.parametrize(("threshold", "last"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_hard_gate(threshold, last):
    alpha, beta = HybridGate(threshold)(torch.arange(9), COUNTS)
    assert beta.tolist() == [1.0] * (last + 1) + [0.0] * (8 - last)
    assert torch.equal(alpha + beta, torch.ones(9))


def test_soft_gate():
    alpha, beta = HybridGate(mode="soft")(torch.arange(9), COUNTS)
    assert list(zip(alpha.tolist(), beta.tolist(), strict=True)) == list(SOFT_TABLE)


def test_loss_takes_one_of_the_two():
    rl = torch.tensor([1.0, 10.0, 100.0], requires_grad=True)
    demo = torch.tensor([2.0, 20.0, 200.0], requires_grad=True)
    found = hybrid_loss(
        rl, demo, torch.tensor([0, 3, 0]), torch.full((3,), 8), gate=HybridGate(), demo_coef=0.5,
        has_demo=torch.tensor([True, True, False]),
    )  # fmt: skip
    found.loss.backward()
    assert float(found.loss.detach()) == pytest.approx((0.5 * 2 + 10 + 100) / 3)
    assert found.demo_fraction == pytest.approx(1 / 3) and found.alpha.tolist() == [0, 1, 1]
    assert rl.grad.tolist() == pytest.approx([0, 1 / 3, 1 / 3]) and demo.grad.tolist() == pytest.approx([1 / 6, 0, 0])


def test_demonstrations_run_out():
    gate = HybridGate(max_demo_uses=2)
    seen = [gate(torch.tensor([0, 5]), torch.tensor([8, 8]), prompts=[4, 9])[1].tolist() for _ in range(2)]
    other = HybridGate(max_demo_uses=2)
    other.load_state_dict(gate.state_dict())
    seen.append(other(torch.tensor([0, 0]), torch.tensor([8, 8]), prompts=[4, 9])[1].tolist())
    assert seen == [[1, 0], [1, 0], [0, 1]]


def test_success_is_a_quantile_of_the_first_rewards():
    threshold = RewardThreshold(0.5)
    threshold.update(torch.tensor([0.0, 1.0, 2.0, 10.0]), [1, 1, 1, 2])
    assert threshold(torch.tensor([1.0, 0.9, 9.0, 1.5]), [1, 1, 2, 3]).tolist() == [True, False, False, True]


def test_running_stats_are_of_the_last_rewards_of_a_prompt():
    stats = RunningRewardStats(buffer_size=3, min_count=2, eps=0.0)
    first = stats.update(torch.tensor([1.0, 3.0]), [0, 1])
    assert first.tolist() == pytest.approx([-1, 1])  # too few: the batch's own
    second = stats.update(torch.tensor([3.0, 3.0, 5.0]), [0, 0, 0])
    kept = torch.tensor([3.0, 3.0, 5.0])
    torch.testing.assert_close(second, (kept - kept.mean()) / kept.std(correction=0))


def test_refuses():
    gate = HybridGate()
    for successes, counts in (([0], [0]), ([9], [8]), ([-1], [8]), ([1, 2], [8])):
        with pytest.raises(ValueError, match="`counts`"):
            gate(torch.tensor(successes), torch.tensor(counts))
    with pytest.raises(ValueError, match="`threshold` is 2"):
        HybridGate(2)
    with pytest.raises(ValueError, match="soft table"):
        HybridGate(mode="soft")(torch.tensor([1]), torch.tensor([4]))
    with pytest.raises(ValueError, match="`rl` has shape"):
        hybrid_loss(torch.zeros(2), torch.zeros(3), torch.zeros(3), torch.ones(3), gate=gate)
    with pytest.raises(ValueError, match="takes an update"):
        RewardThreshold()(torch.zeros(1), [0])


def solved(method, steps, seed):
    """P(right) of a linear softmax policy over 500 actions with 64 prompts after some steps of Adam."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(64, 48, generator=generator) / 48**0.5
    right = torch.randint(500, (64,), generator=generator)
    weight = torch.zeros(48, 500, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1, betas=(0.9, 0.99))
    gate = HybridGate()
    for _ in range(steps):
        prompts = torch.randint(64, (16,), generator=generator)
        log_pi = (features[prompts] @ weight).log_softmax(1)
        actions = torch.multinomial(log_pi.detach().exp(), 8, replacement=True, generator=generator)
        rewards = (actions == right[prompts][:, None]).float()
        advantages = group_advantages(rewards.flatten(), torch.arange(16).repeat_interleave(8)).view(16, 8)
        rl = -(advantages * log_pi.gather(1, actions)).mean(1)
        good = torch.rand(16, generator=generator) < 0.5
        demos = torch.where(good, right[prompts], torch.randint(500, (16,), generator=generator))
        nll = -log_pi.gather(1, demos[:, None])[:, 0]
        if method == "hybrid":
            loss = hybrid_loss(rl, nll, rewards.sum(1), torch.full((16,), 8), gate=gate).loss
        else:
            loss = {"rl": rl, "sft": nll, "sum": rl + nll}[method].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((features @ weight).softmax(1).detach()[torch.arange(64), right].mean())


def test_the_gate_beats_its_parts():
    found = {method: solved(method, 100, 0) for method in ("rl", "sft", "sum", "hybrid")}
    assert found["hybrid"] >= 0.93 and max(found[m] for m in ("rl", "sft", "sum")) <= 0.72, found
