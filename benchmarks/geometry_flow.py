"""Gradient flow of points on a sphere to Stanford's bunny: exact W_2 against wall time, by the loss that drives it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from trimtab.geometry import (
    chamfer_distance,
    distributional_sliced_wasserstein,
    earth_movers_distance,
    load_point_cloud,
    normalize_cloud,
    render_point_cloud,
    sliced_wasserstein,
)

__all__ = ["LOSSES", "bunny", "flow"]

LOSSES: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "SW, 100 slices": lambda x, y, g: sliced_wasserstein(x, y, generator=g),
    "v-DSW, 100 slices, 2 ascent steps": lambda x, y, g: distributional_sliced_wasserstein(
        x, y, steps=2, num_projections=100, direction=torch.randn(3, generator=g), generator=g
    ),
    "Chamfer": lambda x, y, g: chamfer_distance(x, y),
}


def bunny(count: int) -> Tensor:
    """Points on the bunny that gradio carries, or on a torus where it carries none."""
    generator = torch.Generator().manual_seed(0)
    try:
        from gradio.media import get_model3d

        path = get_model3d("Bunny.obj")
    except Exception:  # gradio is missing, or without this file
        angles = 2 * torch.pi * torch.rand(count, 2, generator=generator)
        reach = 1 + 0.4 * angles[:, 1].cos()
        points = [reach * angles[:, 0].cos(), 0.4 * angles[:, 1].sin(), reach * angles[:, 0].sin()]
        return normalize_cloud(torch.stack(points, 1))[0]
    return normalize_cloud(load_point_cloud(path, num_points=count, generator=generator))[0]


def flow(output: Path, *, quick: bool = False) -> list[dict[str, Any]]:
    """Adam on the points under each loss for the same wall time; writes a picture of the ends.

    Args:
        output: folder of ``geometry_flow.png``.
        quick: little time and few points.

    Returns:
        a row a loss and time: exact W_2 (on all points) and the iterations done.
    """
    count, budget = (128, 0.4) if quick else (1024, 16.0)
    target = bunny(count)
    rows, ends = [], [target]
    marks = [budget / 2**k for k in range(4, -1, -1)]
    for name, loss in LOSSES.items():
        generator = torch.Generator().manual_seed(0)
        x = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=0.02)
        spent, steps = 0.0, 0
        for mark in marks:
            while spent < mark:
                start = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = 0.02 * (1 - 0.95 * min(1.0, spent / budget))
                optimizer.zero_grad()
                loss(x, target, generator).backward()
                optimizer.step()
                spent, steps = spent + time.perf_counter() - start, steps + 1
            distance = earth_movers_distance(x.detach(), target, p=2, root=True).item()
            rows.append({"loss": name, "seconds": mark, "iterations": steps, "exact W_2": distance})
        ends.append(x.detach())
    sheet = Image.new("RGB", (320 * len(ends), 320))
    for index, cloud in enumerate(ends):
        sheet.paste(render_point_cloud(cloud), (320 * index, 0))
    sheet.save(output / "geometry_flow.png")
    return rows
