"""Whether pictures near a partly right one are likelier to be right than pictures from new noise.

The question behind `search_pipeline`: a search that looks around the best picture so far can beat best of n only where
they are. Of each caption that 16 pictures leave wrong, the best is turned by an angle on its sphere in random
directions; 90 degrees is as good as new noise.

    python -m trimtab.benchmarks.optim.search_landscape [--num-captions 12] [--pictures 32]
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

import torch
from torch import Tensor

from trimtab.benchmarks.noise_optimization import load
from trimtab.benchmarks.optim.report import RESULTS, Row, print_rows
from trimtab.benchmarks.optim.search_pipeline import ONE_EVALUATION, SCREENING, right_shares, wished_captions
from trimtab.commands.pictures import write_json
from trimtab.pipelines import GenerationMap
from trimtab.rewards import CallableReward

ANGLES = (15, 30, 45, 60, 90)
SEED = 777


def turned(noise: Tensor, angle: float, count: int, generator: torch.Generator) -> Tensor:
    """Noise turned by an angle in random directions, its norm kept.

    Args:
        noise: (1, ...).
        angle: in degrees.
        count: of directions.
        generator: of the directions.

    Returns:
        (count, ...).
    """
    start = noise.flatten(1)
    other = torch.randn(count, start.shape[1], generator=generator)
    other -= other @ start.T / start.square().sum() * start
    other *= start.norm() / other.norm(dim=1, keepdim=True)
    radians = math.radians(angle)
    return (math.cos(radians) * start + math.sin(radians) * other).reshape(count, *noise.shape[1:])


@torch.no_grad()
def neighbours(pipe: Any, caption: str, seed: int, pictures: int) -> tuple[float, dict[int, float]]:
    """The best share of the first pictures, and the part of its neighbours at each angle whose share is higher."""
    generator = torch.Generator().manual_seed(SEED + seed)
    sampler = GenerationMap(pipe, caption, generator=torch.Generator().manual_seed(seed), **ONE_EVALUATION)

    def shares(noises: Tensor) -> Tensor:
        images = [sampler(part).float() for part in noises.split(16)]
        return torch.tensor(right_shares(torch.cat(images), [caption] * len(noises)))

    noises = sampler.sample_latents(SCREENING, generator)
    first = shares(noises)
    best = int(first.argmax())
    higher = {}
    for angle in ANGLES:
        near = shares(turned(noises[best : best + 1].float(), angle, pictures, generator))
        higher[angle] = float((near > first[best] + 1e-6).float().mean())
    return float(first[best]), higher


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-captions", type=int, default=12)
    parser.add_argument("--pictures", type=int, default=32, help="at each angle")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    pipe = load(options.dtype)
    pipe.reward = CallableReward(right_shares)
    captions, _ = wished_captions(pipe, options.num_captions)
    found = [neighbours(pipe, caption, seed, options.pictures) for seed, caption in enumerate(captions)]
    wrong = [higher for best, higher in found if best < 1]
    mean = {angle: statistics.fmean(higher[angle] for higher in wrong) for angle in ANGLES}
    rows = [
        Row(f"better than the best of {SCREENING}: turned by {angle} degrees, against new noise; {len(wrong)} captions",
            mean[angle], mean[90], "reported", True)
        for angle in ANGLES[:-1]
    ]  # fmt: skip
    content = {"captions": captions, "found": found, "rows": [vars(row) for row in rows]}
    write_json(RESULTS / "search_landscape.json", content)
    print_rows(rows)


if __name__ == "__main__":
    main()
