"""Small problems for policy gradients, a figure for each method: a denoising chain, prompts with demonstrations, a
prompt policy with several right answers, and control from gymnasium."""

from __future__ import annotations

import math
from collections.abc import Callable

import gymnasium
import torch
from torch import Tensor, nn

from trimtab.optim import (
    HARPG,
    HybridGate,
    NormalizedPGIGT,
    gaussian_log_prob,
    gradient_guided_advantages,
    group_advantages,
    hybrid_loss,
    leave_one_out_advantage,
    policy_gradient_surrogate,
    policy_hvp,
    token_sensitivity,
    unified_policy_loss,
)

__all__ = ["bandit", "chain_gap", "control", "demonstrations", "prompt_policy"]


class DecayingSGD(torch.optim.SGD):
    """Plain policy gradient with the paper's schedule, lr (2/(t+2))^(2/3)."""

    def __init__(self, params: list[Tensor], lr: float, schedule: str = "paper") -> None:
        super().__init__(params, lr=lr)
        self.first, self.taken, self.schedule = lr, 0, schedule

    def step(self, closure: Callable) -> None:
        """One step."""
        decay = (2 / (self.taken + 2)) ** (2 / 3) if self.schedule == "paper" else 1.0
        self.param_groups[0]["lr"] = self.first * decay
        self.taken += 1
        super().step(closure)


def build(method: str, params: list[Tensor], lr: float, schedule: str = "paper", momentum: float = 1.0):
    """An optimizer of the table by name: "pg", "adam", "momentum", "npg_igt", "harpg" or "n_harpg"."""
    options = {"lr": lr, "schedule": schedule, "momentum": momentum}
    if method == "pg":
        return DecayingSGD(params, lr, schedule)
    if method == "adam":
        return torch.optim.Adam(params, lr=lr)
    if method in ("npg_igt", "momentum"):
        return NormalizedPGIGT(params, extrapolate=method == "npg_igt", **options)
    return HARPG(params, normalize=method == "n_harpg", **options)


def optimize(
    optimizer: torch.optim.Optimizer,
    params: list[Tensor],
    draw: Callable[[], tuple[Callable[[], Tensor], Tensor]],
    rollouts: int,
    batch: int,
) -> None:
    """Steps until so many trajectories are used.

    Args:
        optimizer: of :func:`build`.
        params: what it trains.
        draw: gives a function of a batch's log-probabilities, and its advantages.
        rollouts: in all.
        batch: of a draw; HARPG draws two a step after its first.
    """

    def closure() -> Tensor:
        log_probs, advantages = draw()
        optimizer.zero_grad()
        loss = policy_gradient_surrogate(log_probs(), advantages)
        loss.backward()
        return loss

    def product(v: list[Tensor]) -> list[Tensor]:
        log_probs, advantages = draw()
        return policy_hvp(log_probs, params, v, advantages)

    used = 0
    while used < rollouts:
        twice = isinstance(optimizer, HARPG)
        used += batch * (2 if twice and optimizer.iteration else 1)
        optimizer.step(closure, product) if twice else optimizer.step(closure)


def chain_gap(method: str, lr: float, seed: int, *, scale: float = 1.0, steps: int = 250, batch: int = 16) -> float:
    """J* - J, in closed form, after finetuning a chain of four Gaussian steps in four dimensions.

    x' = x + (theta_k - x) / 2 + e / 2 from x ~ N(0, I); reward ``scale`` exp(-||x_4 - c||^2 / 8).
    """
    goal = torch.tensor([1.5, -1.0, 0.5, 2.0])
    theta = nn.Parameter(torch.zeros(4, 4))
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Callable[[], Tensor], Tensor]:
        states = [torch.randn(batch, 4, generator=generator)]
        for k in range(4):
            noise = torch.randn(batch, 4, generator=generator)
            states.append(0.5 * (states[-1] + theta[k].detach() + noise))
        before, after = torch.stack(states[:-1], 1), torch.stack(states[1:], 1)
        rewards = scale * torch.exp(-(states[-1] - goal).square().sum(1) / 8)

        def log_probs() -> Tensor:
            return gaussian_log_prob(after, 0.5 * (before + theta), 0.5)

        return log_probs, leave_one_out_advantage(rewards)

    optimize(build(method, [theta], lr), [theta], draw, steps * batch, batch)
    mean = torch.tensor([0.5**4, 0.5**3, 0.5**2, 0.5]) @ theta.detach()
    variance = 0.25 * sum(0.25**k for k in range(4)) + 0.25**4
    best = (1 + variance / 4) ** -2
    return best - best * math.exp(-float((mean - goal).square().sum()) / (8 + 2 * variance))


def bandit(method: str, lr: float, seed: int, *, pulls: int = 960) -> float:
    """P(best) of a softmax policy over five arms with noisy rewards."""
    means, logits = torch.tensor([0.1, 0.5, 0.3, 1.0, 0.7]), nn.Parameter(torch.zeros(5))
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Callable[[], Tensor], Tensor]:
        arms = torch.multinomial(logits.detach().softmax(0), 16, replacement=True, generator=generator)
        rewards = means[arms] + 0.1 * torch.randn(16, generator=generator)
        return lambda: logits.log_softmax(0)[arms], leave_one_out_advantage(rewards)

    optimize(build(method, [logits], lr), [logits], draw, pulls, 16)
    return float(logits.detach().softmax(0)[3])


def control(task: str, method: str, lr: float, seed: int, *, iterations: int = 30) -> float:
    """Mean return of the last fifth of the episodes, at equal episodes; "cartpole" or "pendulum"."""
    torch.manual_seed(seed)
    if task == "cartpole":
        env = gymnasium.make_vec("CartPole-v1", num_envs=16, vectorization_mode="vector_entry_point")
        model, limit = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)), 150
    else:
        env = gymnasium.make_vec("Pendulum-v1", num_envs=8, vectorization_mode="sync", g=2.0, max_episode_steps=80)
        model, limit = nn.Linear(3, 1), 80
    generator, totals = torch.Generator().manual_seed(seed), []
    optimizer = build(method, params := list(model.parameters()), lr, "constant", 0.3)

    def log_density(seen: Tensor, action: Tensor) -> Tensor:
        if task == "cartpole":
            return model(seen).log_softmax(-1).gather(-1, action)[..., 0]
        return gaussian_log_prob(action.flatten(0, -2), model(seen).flatten(0, -2), 0.7).view(action.shape[:-1])

    def draw() -> tuple[Callable[[], Tensor], Tensor]:
        seen, actions, rewards, alive = _episodes(env, model, task, limit, generator, 1000 * seed + len(totals))
        totals.append(float(rewards.sum(1).mean()))
        return lambda: log_density(seen, actions) * alive, _to_go(rewards, alive)

    optimize(optimizer, params, draw, iterations * env.num_envs, env.num_envs)
    env.close()
    last = totals[-max(1, len(totals) // 5) :]
    return sum(last) / len(last)


@torch.no_grad()
def _episodes(env, model: nn.Module, task: str, limit: int, generator: torch.Generator, seed: int) -> tuple:
    """Observations (B, T, D), actions (B, T, 1), rewards (B, T) and who is alive (B, T)."""
    observation, _ = env.reset(seed=seed)
    alive, rows = torch.ones(env.num_envs), []
    for _ in range(limit):
        seen = torch.from_numpy(observation).float()
        output = model(seen)
        if task == "cartpole":
            action = torch.multinomial(output.softmax(1), 1, generator=generator)
            taken = action[:, 0].numpy()
        else:
            action = output + 0.7 * torch.randn(output.shape, generator=generator)
            taken = action.numpy()
        observation, reward, terminated, truncated, _ = env.step(taken)
        rows.append((seen, action, torch.from_numpy(reward).float() * alive, alive))
        alive = alive * torch.from_numpy(~(terminated | truncated)).float()
        if not bool(alive.any()):
            break
    return tuple(torch.stack(column, 1) for column in zip(*rows, strict=True))


def _to_go(rewards: Tensor, alive: Tensor, gamma: float = 0.99) -> Tensor:
    returns, following = torch.zeros_like(rewards), torch.zeros(len(rewards))
    for step in reversed(range(rewards.shape[1])):
        following = rewards[:, step] + gamma * following
        returns[:, step] = following
    return (returns - (returns * alive).sum(0) / alive.sum(0).clamp(min=1)) * alive


def demonstrations(
    method: str,
    seeds: int,
    *,
    gate: float = 0.0,
    actions: int = 500,
    fixed_wrong: float | None = None,
    steps: int = 100,
) -> float:
    """P(right) of a linear softmax policy over 64 prompts; 16 prompts of 8 rollouts a step of Adam.

    A demonstration is right half of the time and a random action otherwise, or with ``fixed_wrong`` one action for
    each prompt, which is wrong for that share of them.

    Args:
        method: "rl", "sft", "sum", "sft_then_rl" (a third of the steps the one, then the other) or "hybrid".
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(seeds, 64, 48, generator=generator) / 48**0.5
    right = torch.randint(actions, (seeds, 64), generator=generator)
    wrong = torch.randint(actions, (seeds, 64), generator=generator)
    kept = torch.where(torch.rand(seeds, 64, generator=generator) < (fixed_wrong or 0.0), wrong, right)
    weight = torch.zeros(seeds, 48, actions, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1, betas=(0.9, 0.99))
    hybrid, rows = HybridGate(gate), torch.arange(seeds)[:, None]
    for step in range(steps):
        prompts = torch.randint(64, (seeds, 16), generator=generator)
        log_pi = (features[rows, prompts] @ weight).log_softmax(2).flatten(0, 1)
        answer = right[rows, prompts].flatten()
        taken = torch.multinomial(log_pi.detach().exp(), 8, replacement=True, generator=generator)
        rewards = (taken == answer[:, None]).float()
        advantages = group_advantages(rewards.flatten(), torch.arange(len(answer)).repeat_interleave(8)).view(-1, 8)
        rl = (
            unified_policy_loss(log_pi.gather(1, taken).flatten(), advantages.flatten(), reduction="sequence")
            .per_sample.view(-1, 8)
            .mean(1)
        )
        good = torch.rand(len(answer), generator=generator) < 0.5
        shown = torch.where(good, answer, torch.randint(actions, (len(answer),), generator=generator))
        shown = kept[rows, prompts].flatten() if fixed_wrong is not None else shown
        nll = -log_pi.gather(1, shown[:, None])[:, 0]
        if method == "hybrid":
            counts = torch.full((len(answer),), 8)
            loss = hybrid_loss(rl, nll, rewards.sum(1), counts, gate=hybrid).loss
        else:
            first = "sft" if step < steps // 3 else "rl"
            loss = {"rl": rl, "sft": nll, "sum": rl + nll}[first if method == "sft_then_rl" else method].mean()
        optimizer.zero_grad()
        (seeds * loss).backward()  # a mean over all runs: each has its own weights, and Adam's steps their own scale
        optimizer.step()
    chances = (features @ weight.detach()).softmax(2)
    return float(chances.gather(2, right[..., None]).mean())


def prompt_policy(
    seed: int, *, strength: float, normalize: str, entropy: float = 0.0, steps: int = 100
) -> tuple[float, float]:
    """P(right), and of three right clusters how many are in use, exp(entropy), of a policy that begins with one.

    16 prompts; 60 actions in 6 clusters of similar embeddings, 3 of them right; 8 answers each, plain steps of 0.2.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = nn.functional.normalize(torch.randn(6, 24, generator=generator), dim=1) * 2
    cluster = torch.arange(60) % 6
    weight = centres[cluster] + 0.3 * torch.randn(60, 24, generator=generator)
    hidden = (0.35 * centres[0] + 0.1 * torch.randn(16, 24, generator=generator)).requires_grad_()
    groups = torch.arange(16).repeat_interleave(8)
    for _ in range(steps):
        logits = hidden @ weight.T
        log_pi = logits.log_softmax(1)
        taken = torch.multinomial(log_pi.detach().exp(), 8, replacement=True, generator=generator).flatten()
        rewards = torch.where(cluster[taken] < 3, 1.0, -1.0)
        features = token_sensitivity(logits.detach()[groups][:, None], taken[:, None], weight)
        advantages = gradient_guided_advantages(rewards, features, groups, strength=strength, normalize=normalize)
        loss = 16 * unified_policy_loss(log_pi[groups, taken], advantages, reduction="sequence").loss
        loss = loss - entropy * -(log_pi.exp() * log_pi).sum()
        (gradient,) = torch.autograd.grad(loss, hidden)
        hidden = (hidden.detach() - 0.2 * gradient).requires_grad_()
    chances = (hidden.detach() @ weight.T).softmax(1)
    shares = torch.stack([chances[:, cluster == i].sum(1) for i in range(3)], 1)
    right = shares.sum(1)
    shares = shares / right[:, None]
    used = -(shares * shares.clamp(min=1e-12).log()).sum(1)
    return float(right.mean()), float(used.exp().mean())
