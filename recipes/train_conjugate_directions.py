"""The network that proposes search directions: ``python -m trimtab.recipes.train_conjugate_directions``.

Trained without solutions, on right-hand sides alone, as in "A Deep Conjugate Direction Method for Iteratively Solving
Linear Systems" (arXiv:2205.10763): sums of Ritz vectors of the operator, its smooth half nine times as strong. The
operator is Poisson's, -Laplace on squares and random masks of 32 pixels a side, then of 64; there each right-hand side
is followed by what the network's own step leaves of it, which is what it is shown in the solver. It resumes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import interpolate

from trimtab.assets import asset_path
from trimtab.optim.solvers import (
    DeepDirections,
    DirectionNet,
    GridPoisson,
    conjugate_directions,
    direction_loss,
    ritz_pairs,
    ritz_right_hand_sides,
)

from .curvature import add_curvature_argument, with_curvature
from .training_loop import TrainingSettings, averaged_weights, train

__all__ = ["PRESETS", "DirectionTraining", "Domain", "Preset", "main", "random_mask"]


@dataclass(frozen=True)
class Preset:
    """Sizes that suit a machine.

    Attributes:
        net: arguments of the network.
        training: of the whole; its batch is for the first size.
        sizes: pixels a side, small to large.
        size_steps: steps at each but the last, which gets the rest.
        domains: masks of each size, every third a full square.
        ritz_vectors: of each mask.
        unrolled: steps of the solver that a right-hand side is followed through; at the first size only one, as a
            network that knows nothing yet learns nothing from what it leaves.
    """

    net: dict
    training: TrainingSettings
    sizes: tuple[int, ...]
    size_steps: tuple[int, ...]
    domains: int
    ritz_vectors: int
    unrolled: int


PRESETS = {
    "cpu": Preset(
        net={"width": 16, "pairs": 2},
        training=TrainingSettings(1400, 8, 3e-3, warmup_steps=50, decay_start=0.4, weight_decay=0.0, ema_decay=0.99),
        sizes=(32, 64),
        size_steps=(900,),
        domains=24,
        ritz_vectors=160,
        unrolled=2,
    ),
    "gpu": Preset(
        net={"width": 32, "pairs": 3},
        training=TrainingSettings(20_000, 64, 2e-3, warmup_steps=200, decay_start=0.3, weight_decay=0.0),
        sizes=(32, 64, 128),
        size_steps=(6000, 8000),
        domains=96,
        ritz_vectors=400,
        unrolled=4,
    ),
}


def random_mask(size: int, generator: torch.Generator) -> Tensor:
    """A disc, a rectangle or the islands of a smooth noise, half of them with a round hole; bool (size, size)."""

    def number(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    row, column = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")

    def disc(low: float, high: float) -> Tensor:
        y, x, radius, aspect = number(0.25, 0.75), number(0.25, 0.75), number(low, high), number(0.6, 1.6)
        return ((row - y) * aspect) ** 2 + ((column - x) / aspect) ** 2 < radius**2

    kind = int(torch.randint(3, (), generator=generator))
    if kind == 0:
        mask = disc(0.25, 0.6)
    elif kind == 1:
        top, left, height, width = number(0, 0.3), number(0, 0.3), number(0.4, 0.9), number(0.4, 0.9)
        mask = (row > top) & (row < top + height) & (column > left) & (column < left + width)
    else:
        knots = int(torch.randint(4, 9, (), generator=generator))
        noise = torch.randn(1, 1, knots, knots, generator=generator)
        mask = interpolate(noise, size=(size, size), mode="bicubic")[0, 0] > number(-0.6, 0.3)
    if number(0, 1) < 0.5:
        mask = mask & ~disc(0.04, 0.15)
    return mask if bool(mask.any()) else random_mask(size, generator)


@dataclass(frozen=True)
class Domain:
    """A mask with its operator and Ritz vectors.

    Attributes:
        operator: -Laplace on the mask.
        vectors: (m, H, W).
    """

    operator: GridPoisson
    vectors: Tensor

    @classmethod
    def draw(cls, size: int, ritz_vectors: int, seed: int, *, full: bool) -> Domain:
        """One by its seed: the full square, or a random mask."""
        generator = torch.Generator().manual_seed(seed)
        mask = torch.ones(size, size, dtype=torch.bool) if full else random_mask(size, generator)
        wide = GridPoisson(mask, dtype=torch.float64)
        start = torch.randn(size, size, generator=generator, dtype=torch.float64) * wide.mask
        _, vectors = ritz_pairs(wide, start, min(ritz_vectors, int(mask.sum())))
        return cls(GridPoisson(mask), vectors.float())


class DirectionTraining(nn.Module):
    """A network with the paper's loss, along a few steps of the solver; each is shown what the one before left.

    Args:
        net: to train.
    """

    def __init__(self, net: DirectionNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, operator: GridPoisson, b: Tensor, steps: int) -> Tensor:
        """The mean loss of each of so many steps, (steps,), for right-hand sides (B, H, W)."""
        losses, r = [], b
        with torch.autocast(b.device.type, enabled=False):  # small convolutions in bf16 are slow on CPUs
            for _ in range(steps):
                f = self.net(r[:, None], operator.mask[None, None])[:, 0]
                each, left = direction_loss(operator, r, f)
                losses.append(each.mean())
                left = left.detach()
                r = left / left.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None]
        return torch.stack(losses)


def train_directions(
    module: DirectionTraining, preset: Preset, folder: Path, *, max_seconds: float | None = None
) -> bool:
    """Trains on the preset's sizes in turn; gives whether all steps are done."""
    pools: dict[int, list[Domain]] = {}
    ends = [sum(preset.size_steps[: index + 1]) for index in range(len(preset.size_steps))]

    def loss_of_step(
        prepared: nn.Module, step: int, draw: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        place = sum(step >= end for end in ends)
        size = preset.sizes[place]
        if size not in pools:
            pools.clear()  # the sizes before are done
            pools[size] = [
                Domain.draw(size, preset.ritz_vectors, 1000 * size + index, full=index % 3 == 0)
                for index in range(preset.domains)
            ]
        generator = torch.Generator().manual_seed(preset.training.seed * 1_000_003 + draw)
        domain = pools[size][int(torch.randint(preset.domains, (), generator=generator))]
        count = max(1, preset.training.batch_size * preset.sizes[0] // size)
        b = ritz_right_hand_sides(domain.vectors, count, generator=generator)
        losses = prepared(domain.operator.to(device), b.to(device), preset.unrolled if place else 1)
        return losses.mean(), {f"step_{k}": loss.detach() for k, loss in enumerate(losses)}

    return train(module, loss_of_step, preset.training, folder, max_seconds=max_seconds)


def write_model(net: DirectionNet, folder: Path, text: str) -> None:
    """Writes the weights, the configuration and the card, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({name: value.detach().contiguous() for name, value in net.state_dict().items()})
    for name, content in (
        ("config.json", (json.dumps(net.config, indent=2) + "\n").encode()),
        ("README.md", text.encode()),
        ("model.safetensors", weights),
    ):
        temporary = folder / f"{name}.tmp"
        temporary.write_bytes(content)
        temporary.replace(folder / name)


def iterations(net: DirectionNet | None, size: int, seed: int = 123) -> int:
    """Steps to a relative residual of 1e-4 on the full square for white noise; None is plain conjugate gradients."""
    A = GridPoisson(torch.ones(size, size, dtype=torch.bool))
    b = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    propose = None if net is None else DeepDirections(A, net)
    return conjugate_directions(A, b, propose=propose, tolerance=1e-4, max_iterations=20 * size).iterations


def _card(net: DirectionNet, preset: Preset) -> str:
    parameters = sum(parameter.numel() for parameter in net.parameters())
    rows = [f"| {size} | {iterations(net, size)} | {iterations(None, size)} |" for size in (32, 64, 128)]
    return f"""---
license: apache-2.0
tags: [linear-solver, poisson-equation, conjugate-gradients, tiny]
---

# conjugate-directions

A convolutional network of {parameters:,} parameters that proposes search directions for Poisson's equation on the
pixels of a mask, trained from nothing and without solutions after "A Deep Conjugate Direction Method for Iteratively
Solving Linear Systems" (arXiv 2205.10763). It ships with [trimtab](https://github.com/trimtab/trimtab).

```python
import torch
from trimtab.optim.solvers import DeepDirections, GridPoisson, conjugate_directions

A = GridPoisson(torch.ones(128, 128, dtype=torch.bool))
result = conjugate_directions(A, torch.randn(128, 128), propose=DeepDirections(A))
```

Iterations to a relative residual of 1e-4, white noise on a square that is 0 at its edges:

| pixels a side | this network | plain conjugate gradients |
|---|---|---|
{chr(10).join(rows)}

Few iterations are not little time: one costs as much as dozens of plain ones, and on a CPU `Multigrid`, which needs
about as few, is the fastest choice.

## How it was made

`python -m trimtab.recipes.train_conjugate_directions` (seed {preset.training.seed}): {preset.training.num_steps:,}
steps on squares and random masks of {" and ".join(map(str, preset.sizes))} pixels a side. The weights are under the
Apache License 2.0.
"""


def main(arguments: list[str] | None = None) -> None:
    """Trains, or goes on, and writes the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "gpu" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), default=default, help=f"default here: {default}")
    add("--folder", type=Path, default=Path("out/conjugate_directions"), help="where the checkpoint lies")
    add("--output", type=Path, help="the model's folder (default: assets/conjugate-directions)")
    add("--max-seconds", type=float, help="stop with a checkpoint after this time")
    add_curvature_argument(parser)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    preset = with_curvature(PRESETS[options.preset]) if options.curvature else PRESETS[options.preset]
    module = DirectionTraining(DirectionNet(**preset.net))
    if not train_directions(module, preset, options.folder, max_seconds=options.max_seconds):
        print(f"stopped after {options.max_seconds:g} s; run the same command to go on")
        return
    averaged_weights(module, options.folder)
    net = module.net.cpu().eval()
    output = options.output or asset_path("emoji-sprites").parent / "conjugate-directions"
    write_model(net, output, _card(net, preset))
    print(f"written to {output}")


if __name__ == "__main__":
    main()
