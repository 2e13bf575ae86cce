"""The flow from N(0, 1) to N(MEAN, STD^2) in each coordinate, whose velocity is known, and a sampling loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MEAN = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
STD = torch.tensor([0.05, 0.3, 1.0, 2.0], dtype=torch.float64)

Velocity = Callable[[torch.Tensor, float], torch.Tensor]


def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[noise - data | x] on the path x = (1 - sigma) data + sigma noise; x (..., 4)."""
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    return -MEAN + (sigma - (1 - sigma) * STD**2) / variance * (x - (1 - sigma) * MEAN)


def run(scheduler: Any, flow: Velocity, x: torch.Tensor, **schedule: Any) -> torch.Tensor:
    """The loop of a stock pipeline around a velocity that takes sigma = timestep / 1000."""
    scheduler.set_timesteps(**schedule)
    for t in scheduler.timesteps:
        x = scheduler.step(flow(x, float(t) / 1000), t, x, return_dict=False)[0]
    return x
