"""One step of reward finetuning: the loss of an estimator by name, and how its optimizer wants it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trimtab.optim import (
    HARPG,
    HybridGate,
    NormalizedPGIGT,
    hybrid_loss,
    policy_gradient_surrogate,
    policy_hvp,
    unified_policy_loss,
)

from .checkpoints import trained_parameters
from .reward_rollouts import NORMALIZED, Rollouts, RolloutSource, joined

__all__ = ["PolicyUpdate"]


class PolicyUpdate(RolloutSource):
    """A training loop's step: see ``update`` of :func:`trimtab.recipes.training_loop.train`.

    Args:
        args, options: of :class:`RolloutSource`.
        draws: whose gradients are averaged in a step.
    """

    def __init__(self, *args: Any, draws: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)
        self.draws, self.gate = draws, HybridGate(self.estimator.gate)

    def __call__(
        self, accelerator: Accelerator, prepared: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int
    ) -> tuple[float, dict[str, float]]:
        """One step."""
        draws = [
            (step * self.draws + i) * accelerator.num_processes + accelerator.process_index for i in range(self.draws)
        ]
        if self.estimator.name in NORMALIZED:
            return self._normalized_step(accelerator, prepared, optimizers[0].optimizer, draws)
        batches = [self.roll_out(draw, accelerator.device) for draw in draws]
        for _ in range(self.estimator.passes):
            loss, figures = self._backward(accelerator, prepared, batches)
            accelerator.clip_grad_norm_(self.module.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return loss, figures

    def _normalized_step(
        self, accelerator: Accelerator, prepared: nn.Module, optimizer: torch.optim.Optimizer, draws: list[int]
    ) -> tuple[float, dict[str, float]]:
        """N-PG-IGT draws at its look-ahead point, HARPG at two points."""
        figures: dict[str, float] = {}

        def closure() -> float:
            optimizer.zero_grad()
            batches = [self.roll_out(draw, accelerator.device) for draw in draws]
            loss, found = self._backward(accelerator, prepared, batches)
            figures.update({**found, "drawn": found["drawn"] + figures.get("drawn", 0)})
            return loss

        def product(v: list[Tensor]) -> list[Tensor]:
            sums = [torch.zeros_like(d) for d in v]
            for draw in draws:
                batch = self.roll_out(draw, accelerator.device, stream=1)
                figures["drawn"] = figures.get("drawn", 0) + batch.drawn * accelerator.num_processes
                parts = policy_hvp(
                    lambda batch=batch: self.policy.log_probs(self.module, batch.chains, reduce="sum"),
                    list(trained_parameters(self.module).values()),
                    v,
                    batch.advantages,
                )
                sums = [total + part / len(draws) for total, part in zip(sums, parts, strict=True)]
            return [accelerator.reduce(total, "mean") for total in sums]

        if isinstance(optimizer, HARPG):
            # of the draw alone, so that a run that was stopped goes on as if it had not been
            optimizer.generator.manual_seed(self.seed * 1_000_003 + draws[0] // max(1, accelerator.num_processes))
            loss = optimizer.step(closure, product)
        elif isinstance(optimizer, NormalizedPGIGT):
            loss = optimizer.step(closure)
        else:
            raise TypeError(f"`optimizers` holds a {type(optimizer).__name__}; {self.estimator.name} takes its own")
        optimizer.zero_grad()
        return loss, figures

    def _backward(
        self, accelerator: Accelerator, prepared: nn.Module, batches: list[Rollouts]
    ) -> tuple[float, dict[str, float]]:
        """Gradients of the mean loss of the batches, over all processes; one call of the network for each."""
        losses, shown = [], []
        for number, batch in enumerate(batches):
            waits = number < len(batches) - 1 and accelerator.num_processes > 1
            with accelerator.no_sync(prepared) if waits else torch.enable_grad():
                loss, figures = self.loss(prepared, batch)
                accelerator.backward(loss * accelerator.gradient_accumulation_steps / len(batches))
            losses.append(loss.detach())
            shown.append(figures)
        figures = {name: sum(item[name] for item in shown) / len(shown) for name in shown[0]}
        told = torch.tensor(list(figures.values()), device=accelerator.device)
        figures = dict(zip(figures, accelerator.reduce(told, "mean").tolist(), strict=True))
        figures["drawn"] = sum(batch.drawn for batch in batches) * accelerator.num_processes
        return float(torch.stack(losses).mean()), figures

    def loss(self, prepared: nn.Module, batch: Rollouts) -> tuple[Tensor, dict[str, float]]:
        """The estimator's loss of a draw, and figures."""
        figures = {"reward": float(batch.rewards.mean()), "solved": float(batch.successes.mean())}
        name, given = self.estimator.name, self.estimator
        if name in NORMALIZED:
            log_probs = self.policy.log_probs(prepared, batch.chains, reduce="sum")
            return policy_gradient_surrogate(log_probs, batch.advantages), figures
        if given.hybrid:
            loss, figures["demos"] = self._hybrid_loss(prepared, batch)
            return loss, figures
        kept = batch.advantages.cpu().nonzero().flatten()  # groups of equal rewards have no gradient
        kept = kept if len(kept) else torch.zeros(1, dtype=torch.long)
        log_probs = self.policy.log_probs(prepared, batch.chains.rows(kept), reduce="mean")
        if batch.ref is None:
            batch.ref = log_probs.detach()
        options = {"reduction": "sequence"}
        if name != "reinforce" or given.passes > 1:
            options |= {"ref_log_probs": batch.ref, "stability": "ppo", "clip": given.clip}
        found = unified_policy_loss(log_probs, batch.advantages[kept], **options)
        return found.loss * (len(kept) / len(batch.rewards)), {**figures, "stable": found.stable_fraction}

    def _hybrid_loss(self, prepared: nn.Module, batch: Rollouts) -> tuple[Tensor, float]:
        """Only what counts has a graph: rollouts of prompts without a demonstration, and the demonstrations."""
        n, taken = self.estimator.group_size, batch.chains.states.shape[1] - 1
        has_demo = torch.zeros(self.prompts, dtype=torch.bool)
        has_demo[batch.demo_prompts] = True
        own = (~has_demo).nonzero().flatten()
        rows = (own[:, None] * n + torch.arange(n)).flatten()
        parts = [batch.chains.rows(rows.to(batch.rewards.device))] if len(rows) else []
        parts += [batch.demos] if batch.demos is not None else []
        log_probs = self.policy.log_probs(prepared, joined(parts), reduce="mean")
        if batch.ref is None:
            batch.ref = log_probs.detach()
        rl, nll = (log_probs.new_zeros(self.prompts) for _ in range(2))
        if len(rows):
            found = unified_policy_loss(
                log_probs[: len(rows)],
                batch.advantages[rows.to(batch.advantages.device)],
                ref_log_probs=batch.ref[: len(rows)],
                reduction="constant",
                constant=float(taken),
            )
            rl = rl.index_add(0, own.to(rl.device), found.per_sample.view(-1, n).mean(1))
        if len(batch.demo_prompts):
            nll = nll.index_add(0, batch.demo_prompts.to(nll.device), -log_probs[len(rows) :].mean(1))
        solved = batch.successes.view(-1, n).sum(1)
        found = hybrid_loss(
            rl,
            nll,
            solved,
            torch.full_like(solved, n),
            gate=self.gate,
            demo_coef=self.estimator.demo_coef,
            has_demo=has_demo.to(solved.device),
        )
        return found.loss, found.demo_fraction
