"""The heads of a personal reward and how each is fitted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from trimtab.optim.solvers import convex_relu, fit_linear_head, fit_preference_head, module_patterns, polish

from .personal_votes import Votes

__all__ = ["HEADS", "fit_head", "network_decay", "train_network"]

HEADS = ("polished", "linear", "robust")
NEURONS = 32
STEPS = 150
LINEAR_DECAY = 1.0
POLISH: dict[str, Any] = {"max_iterations": 200, "tolerance": 1e-4, "rho": 1.0, "acceleration": 0}
"""A short run: acceleration doubles its time and lowers the objective by a thousandth."""


def network_decay(count: int) -> float:
    """Weight decay of a network fitted to so many votes: a twentieth of them, 3 at most.

    Chosen on other simulated people than those that are reported; from 1 to 5 little changes at 200 votes.
    """
    return min(3.0, count / 20)


def fit_head(
    x: Tensor, votes: Votes, kind: str, decay: float | None, epsilon: float, generator: torch.Generator
) -> nn.Module:
    """A head on inputs (N, d): Linear, or Linear, ReLU, Linear, in float64; see `fit_personal_reward`."""
    x = x.double()
    count = len(votes.targets)
    if kind == "linear":
        l2 = (LINEAR_DECAY if decay is None else decay) / count
        if votes.pairs is None:
            return fit_linear_head(x, votes.targets > 0, l2=l2)
        return fit_preference_head(x[votes.pairs[:, 0]], x[votes.pairs[:, 1]], l2=l2)
    beta = network_decay(count) if decay is None else decay
    y = votes.targets if votes.pairs is None else None
    network = train_network(x, votes, beta, generator)
    if kind == "polished":
        return polish(network, x, y, beta=beta, loss="logistic", pairs=votes.pairs, **POLISH).module
    patterns = module_patterns(network, x)
    options = {**POLISH, "tolerance": 1e-6, "epsilon": epsilon, "pairs": votes.pairs}
    result = convex_relu(x, y, patterns, beta=beta, loss="logistic", **options)
    if float(torch.cat([result.v, result.w])[:, :-1].abs().max()) < 1e-6:
        raise ValueError(
            f"`epsilon` is {epsilon:g}; no pattern of the trained network holds over boxes so large: take less"
        )
    return result.to_module()


def train_network(
    x: Tensor, votes: Votes, beta: float, generator: torch.Generator, *, neurons: int = NEURONS, steps: int = STEPS
) -> nn.Sequential:
    """Linear, ReLU, Linear by AdamW on sum softplus(-m) + beta/2 (weights squared), all examples at once.

    The decay is part of the objective, so that what is trained is what is polished.

    Args:
        x: (N, d) float64.
        votes: on the rows.
        beta: > 0.
        generator: of the first weights.
        neurons: of the hidden layer.
        steps: of AdamW, its rate falling from 0.03 to 0 along a cosine.
    """
    network = nn.Sequential(nn.Linear(x.shape[1], neurons), nn.ReLU(), nn.Linear(neurons, 1, bias=False)).to(x)
    with torch.no_grad():
        for layer, size in ((network[0], x.shape[1]), (network[2], neurons)):
            noise = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64, device=generator.device)
            layer.weight.copy_(noise / size**0.5)
        network[0].bias.zero_()
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        f = network(x)[:, 0]
        margin = votes.targets * f if votes.pairs is None else f[votes.pairs[:, 0]] - f[votes.pairs[:, 1]]
        decay = torch.stack([p.square().sum() for p in parameters]).sum()
        (softplus(-margin).sum() + beta / 2 * decay).backward()
        optimizer.step()
        schedule.step()
    return network
