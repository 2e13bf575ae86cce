"""The methods on policies that know nothing of them: a bandit, CartPole and a pendulum from gymnasium."""

import gymnasium
import pytest
import torch
from torch import nn

from trimtab.optim import (
    HARPG,
    NormalizedPGIGT,
    gaussian_log_prob,
    group_advantages,
    leave_one_out_advantage,
    policy_gradient_surrogate,
    policy_hvp,
    unified_policy_loss,
)


def bandit(method, steps=60):
    """P(best arm) of a softmax policy over five arms with noisy rewards."""
    means = torch.tensor([0.1, 0.5, 0.3, 1.0, 0.7])
    logits = nn.Parameter(torch.zeros(5))
    generator = torch.Generator().manual_seed(0)
    optimizer = method([logits], lr=1.0) if method is not torch.optim.Adam else method([logits], lr=0.2)

    def draw():
        arms = torch.multinomial(logits.detach().softmax(0), 16, replacement=True, generator=generator)
        return arms, means[arms] + 0.1 * torch.randn(16, generator=generator)

    def closure():
        arms, rewards = draw()
        optimizer.zero_grad()
        log_probs = logits.log_softmax(0)[arms]
        if method is torch.optim.Adam:
            advantages = group_advantages(rewards, [0] * 16, std=True)
            loss = unified_policy_loss(log_probs, advantages, ref_log_probs=log_probs.detach(), stability="ppo").loss
        else:
            loss = policy_gradient_surrogate(log_probs, leave_one_out_advantage(rewards))
        loss.backward()
        return loss

    def product(v):
        arms, rewards = draw()
        return policy_hvp(lambda: logits.log_softmax(0)[arms], [logits], v, leave_one_out_advantage(rewards))

    for _ in range(steps):
        optimizer.step(closure, product) if method is HARPG else optimizer.step(closure)
    return float(logits.detach().softmax(0)[3])


@pytest.mark.parametrize("method", [NormalizedPGIGT, HARPG, torch.optim.Adam])
def test_bandit(method):
    assert bandit(method) > 0.9


def rollout(env, policy, steps, generator, seed):
    """One episode of each of the environments: log-probabilities (B, T) with a graph, rewards (B, T), alive (B, T)."""
    observation, _ = env.reset(seed=seed)
    alive = torch.ones(env.num_envs)
    log_probs, rewards, masks = [], [], []
    for _ in range(steps):
        action, log_prob = policy(torch.from_numpy(observation).float(), generator)
        observation, reward, terminated, truncated, _ = env.step(action.numpy())
        log_probs.append(log_prob * alive)
        rewards.append(torch.from_numpy(reward).float() * alive)
        masks.append(alive)
        alive = alive * torch.from_numpy(~(terminated | truncated)).float()
        if not bool(alive.any()):
            break
    return torch.stack(log_probs, 1), torch.stack(rewards, 1), torch.stack(masks, 1)


def to_go(rewards, alive, gamma=0.99):
    """Discounted sums from each step on, less their mean over the trajectories that are alive there."""
    returns, following = torch.zeros_like(rewards), torch.zeros(len(rewards))
    for step in reversed(range(rewards.shape[1])):
        following = rewards[:, step] + gamma * following
        returns[:, step] = following
    return (returns - (returns * alive).sum(0) / alive.sum(0).clamp(min=1)) * alive


def train(env, model, policy, steps, iterations, lr, method=NormalizedPGIGT):
    """Mean total rewards of each iteration's episodes."""
    generator, totals = torch.Generator().manual_seed(0), []
    optimizer = method(model.parameters(), lr=lr, schedule="constant", momentum=0.3)

    def closure():
        log_probs, rewards, alive = rollout(env, policy, steps, generator, len(totals))
        totals.append(float(rewards.sum(1).mean()))
        optimizer.zero_grad()
        loss = policy_gradient_surrogate(log_probs, to_go(rewards, alive))
        loss.backward()
        return loss

    for _ in range(iterations):
        optimizer.step(closure)
    env.close()
    return totals


def test_cartpole():
    env = gymnasium.make_vec("CartPole-v1", num_envs=16, vectorization_mode="vector_entry_point")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))

    def policy(observation, generator):
        log_pi = model(observation).log_softmax(1)
        action = torch.multinomial(log_pi.detach().exp(), 1, generator=generator)
        return action[:, 0], log_pi.gather(1, action)[:, 0]

    totals = train(env, model, policy, steps=150, iterations=30, lr=0.15)
    assert sum(totals[:2]) / 2 < 40 and max(totals[-5:]) > 110, totals


@pytest.mark.slow
def test_pendulum():
    """Continuous actions: a pendulum with a weak gravity, held up by a linear Gaussian policy."""
    env = gymnasium.make_vec("Pendulum-v1", num_envs=8, vectorization_mode="sync", g=2.0, max_episode_steps=80)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def policy(observation, generator):
        mean = model(observation)
        action = mean.detach() + 0.7 * torch.randn(mean.shape, generator=generator)
        return action, gaussian_log_prob(action, mean, 0.7)

    totals = train(env, model, policy, steps=80, iterations=25, lr=0.3)
    assert sum(totals[-5:]) > 0.45 * sum(totals[:5]), totals
