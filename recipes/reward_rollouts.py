"""What a step of reward finetuning learns from: groups of rollouts, their rewards, and demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.optim import gradient_guided_advantages, group_advantages, leave_one_out_advantage

from .denoising_policy import Chains, DenoisingPolicy, Texts

__all__ = ["ESTIMATORS", "NORMALIZED", "Estimator", "Reward", "RolloutSource", "Rollouts", "joined"]

Reward = Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]]
"""Pictures (B, 3, H, W) in [0, 1] and captions to rewards (B,) and which of them are successes (B,)."""

NORMALIZED = ("npg_igt", "harpg", "n_harpg")
ESTIMATORS = ("reinforce", "ppo", "grpo", "hybrid", "hybrid_g2rl", *NORMALIZED)
"""Names of :class:`Estimator`."""


@dataclass(frozen=True)
class Estimator:
    """Which policy gradient.

    Attributes:
        name: "reinforce": the others of a group as baseline. "ppo": likewise, clipped. "grpo": clipped, advantages
            divided by the group's deviation. "hybrid": HPT, Dr. GRPO's loss or a demonstration for each prompt.
            "hybrid_g2rl": with advantages by G2RL. "npg_igt", "harpg", "n_harpg": the optimizer is the method.
        group_size: rollouts of a prompt, >= 2.
        share_noise: a group starts from one noise, so that its rewards differ by what the policy did.
        passes: optimizer steps from one draw; of "ppo" and "grpo" the later ones are clipped.
        clip: of the ratio of mean log-densities.
        gate: share of a prompt's rollouts up to which it takes its demonstration.
        demo_draws: further rollouts of a prompt none of whose own succeeded: the best of all is the demonstration.
        demo_coef: weight of the demonstration's loss.
        strength: lambda of G2RL.
    """

    name: str = "grpo"
    group_size: int = 8
    share_noise: bool = True
    passes: int = 1
    clip: float = 1e-4
    gate: float = 0.0
    demo_draws: int = 8
    demo_coef: float = 1.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in ESTIMATORS:
            raise ValueError(f"`name` is {self.name!r}; takes {', '.join(ESTIMATORS)}")
        for name, least in (("group_size", 2), ("passes", 1), ("demo_draws", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; takes an integer >= {least}")
        if not 0 <= self.gate <= 1:
            raise ValueError(f"`gate` is {self.gate}; takes a share in [0, 1]")
        if self.passes > 1 and self.name in NORMALIZED:
            raise ValueError(f"`passes` is {self.passes}; takes 1 for {self.name}, which draws anew for each step")

    @property
    def hybrid(self) -> bool:
        """Whether prompts may take demonstrations."""
        return self.name.startswith("hybrid")


@dataclass
class Rollouts:
    """What a step learns from.

    Attributes:
        chains: B = P n of them, prompt by prompt.
        rewards: (B,).
        successes: (B,), 0 or 1.
        advantages: (B,).
        demos: one chain for each prompt that has a demonstration and the gate lets take it, or None.
        demo_prompts: their numbers among the P.
        ref: log-densities under the policy that drew, from the first pass on.
        drawn: pictures drawn in all.
    """

    chains: Chains
    rewards: Tensor
    successes: Tensor
    advantages: Tensor
    demos: Chains | None
    demo_prompts: Tensor
    drawn: int
    ref: Tensor | None = None


class RolloutSource:
    """Draws by number: the same number and the same weights give the same rollouts.

    Args:
        policy: the sampler.
        module: the network; a training loop gives it back prepared.
        texts: the training prompts.
        reward: needs no gradient.
        estimator: see :class:`Estimator`.
        prompts: of a draw in one process; ``estimator.group_size`` rollouts each.
        seed: of all that is drawn.
    """

    def __init__(
        self,
        policy: DenoisingPolicy,
        module: nn.Module,
        texts: Texts,
        reward: Reward,
        estimator: Estimator,
        *,
        prompts: int,
        seed: int = 0,
    ) -> None:
        self.policy, self.module, self.texts, self.reward = policy, module, texts, reward
        self.estimator, self.prompts, self.seed = estimator, prompts, seed

    @torch.no_grad()
    def roll_out(self, draw: int, device: torch.device, stream: int = 0) -> Rollouts:
        """Draws groups of rollouts, and demonstrations where the gate asks for them.

        Args:
            draw: number of the draw.
            device: of the network.
            stream: another number draws something else.
        """
        given, n, count = self.estimator, self.estimator.group_size, self.prompts
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + draw) * 2 + stream)
        index = torch.randint(len(self.texts.captions), (count,), generator=generator)
        rows = index.repeat_interleave(n)
        noise = torch.randn(count if given.share_noise else count * n, *self.policy.shape, generator=generator)
        noise = noise.repeat_interleave(n, 0) if given.share_noise else noise
        chains, rewards, successes = self._judged(rows, noise, generator, device)
        solved = successes.view(count, n).sum(1)
        groups = torch.arange(count).repeat_interleave(n)
        advantages = self._advantages(chains, rewards, successes, groups, generator)
        demos, demo_prompts, drawn = None, torch.empty(0, dtype=torch.long), count * n
        if given.hybrid:
            asked = (solved <= given.gate * n + 1e-9).nonzero().flatten()
            demos, demo_prompts, more = self._demonstrations(asked, index, chains, rewards, successes, generator)
            drawn += more
        return Rollouts(
            chains, rewards.to(device), successes.to(device), advantages.to(device), demos, demo_prompts, drawn
        )

    def _judged(
        self, rows: Tensor, noise: Tensor, generator: torch.Generator, device: torch.device
    ) -> tuple[Chains, Tensor, Tensor]:
        texts = self.texts.rows(rows)
        chains = self.policy.draw(self.module, texts.to(device), noise, generator)
        rewards, successes = self.reward(self.policy.pictures(chains.latents), texts.captions)
        return chains, rewards.float().cpu(), successes.float().cpu()

    def _advantages(
        self, chains: Chains, rewards: Tensor, successes: Tensor, groups: Tensor, generator: torch.Generator
    ) -> Tensor:
        name = self.estimator.name
        if name == "hybrid_g2rl":
            count = int(groups.max()) + 1
            noise = torch.randn(count, *self.policy.shape, generator=generator)[groups]
            features = self.policy.features(self.module, chains, noise.to(chains.latents))
            return gradient_guided_advantages(
                2 * successes - 1, features.cpu(), groups, strength=self.estimator.strength, normalize="none"
            )
        if name in ("grpo", "hybrid"):
            return group_advantages(rewards, groups, std=name == "grpo")
        return leave_one_out_advantage(rewards, groups)

    def _demonstrations(
        self,
        asked: Tensor,
        index: Tensor,
        chains: Chains,
        rewards: Tensor,
        successes: Tensor,
        generator: torch.Generator,
    ) -> tuple[Chains | None, Tensor, int]:
        """The best chain of each prompt that the gate sends to its demonstration, where one succeeded."""
        n, more, device = self.estimator.group_size, self.estimator.demo_draws, chains.latents.device
        score = torch.where(successes > 0, rewards, -torch.inf)
        best: dict[int, Chains] = {}
        for prompt in asked.tolist():
            row = prompt * n + int(score[prompt * n : (prompt + 1) * n].argmax())
            if successes[row] > 0:
                best[prompt] = chains.rows(torch.tensor([row]))
        rest = torch.tensor([prompt for prompt in asked.tolist() if prompt not in best], dtype=torch.long)
        drawn = len(rest) * more
        if drawn:
            noise = torch.randn(drawn, *self.policy.shape, generator=generator)
            found, rewards, successes = self._judged(index[rest].repeat_interleave(more), noise, generator, device)
            score = torch.where(successes > 0, rewards, -torch.inf)
            for number, prompt in enumerate(rest.tolist()):
                row = number * more + int(score[number * more : (number + 1) * more].argmax())
                if successes[row] > 0:
                    best[prompt] = found.rows(torch.tensor([row]))
        if not best:
            return None, torch.empty(0, dtype=torch.long), drawn
        return joined(list(best.values())), torch.tensor(list(best)), drawn


def joined(parts: Sequence[Chains]) -> Chains:
    """One after the other."""
    texts = Texts(
        [caption for part in parts for caption in part.texts.captions],
        torch.cat([part.texts.features for part in parts]),
        torch.cat([part.texts.pooled for part in parts]),
    )
    return Chains(texts, torch.cat([part.states for part in parts]), torch.cat([part.latents for part in parts]))
