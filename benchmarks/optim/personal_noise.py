"""Whether climbing a personal reward pleases the person: ``python -m trimtab.benchmarks.optim.personal_noise``.

The claim: noise optimization with a taste fitted to 200 pairs raises the hidden taste of pictures. Beside it whether
the robust head is fooled less: hidden taste gained per reward gained, both in standard deviations over scenes, as each
head has its own scale.

The people and the 800 pictures that they choose between are those of `personal_reward`. Prompts leave open what a taste
is about: an object without a ground, or nothing at all. The bundled model's distilled transformer makes the pictures in
four evaluations, in bfloat16; what they show is read by the judge's detector, which shares no weights with a reward. A
picture without a plain ground or a clear object, or with something unclear in it, has none of what a person likes.

    python -m trimtab.benchmarks.optim.personal_noise [--people 2] [--iterations 12] [--cache features.safetensors]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.assets import asset_path
from trimtab.benchmarks.optim.personal_reward import POOL, hidden_taste, pairs_of, scenes_and_features
from trimtab.benchmarks.optim.report import Row, write_report
from trimtab.commands.few_steps import FEW_STEPS_CALL, with_few_steps
from trimtab.commands.pictures import write_json
from trimtab.pipelines import NoiseOptimizationPipeline
from trimtab.recipes.emoji_scenes import SceneFacts, check_scene
from trimtab.rewards import PersonalReward, fit_personal_reward, load_reward

HEADS, PAIRS = ("polished", "robust"), 200
PROMPTS = ("a cat", "a red heart", "", "a pizza", "a blue circle", "", "a rocket", "a green square")
NOTHING = -1.5 - 0.7
"""The taste of a picture that shows nothing clear: what fits is missing, and so are several objects."""


def shown(images: Tensor, prompts: Sequence[str]) -> list[SceneFacts | None]:
    """What pictures show, by the detector, the prompt's object first; None where that is unclear."""
    facts: list[SceneFacts | None] = []
    verdicts = check_scene(images.float().cpu().clamp(0, 1), "a cat on a sky background")
    for verdict, prompt in zip(verdicts, prompts, strict=True):
        names = sorted(dict.fromkeys(item.name for item in verdict.objects), key=lambda name, p=prompt: name not in p)
        if verdict.background is None or not names or not verdict.clean:
            facts.append(None)
        else:
            count = len(verdict.objects) if len(names) == 1 else 1
            facts.append(SceneFacts(tuple(names), count, None, verdict.background))
    return facts


def tastes_of(
    images: Tensor, known: list[SceneFacts], seed: int, prompts: Sequence[str] = PROMPTS
) -> tuple[np.ndarray, int]:
    """A person's liking of pictures in standard deviations over scenes, and how many pictures show nothing clear.

    Args:
        images: (B, 3, H, W) in [0, 1].
        known: the scenes that the person was asked about: likings are drawn in their order.
        seed: the person.
        prompts: of the pictures.
    """
    seen = shown(images, prompts)
    values = hidden_taste([*known, *[each for each in seen if each is not None]], seed)
    found = iter(values[len(known) :].tolist())
    tastes = np.array([NOTHING if each is None else next(found) for each in seen])
    return tastes / float(values[: len(known)].std()), sum(each is None for each in seen)


def climb(pipe: Any, reward: PersonalReward, iterations: int, spread: float) -> dict[str, Any]:
    """First and best pictures of each prompt, and the reward's gain in standard deviations over scenes."""
    output = pipe(
        list(PROMPTS),
        reward=reward,
        num_optimization_steps=iterations,
        generator=[torch.Generator().manual_seed(row) for row in range(len(PROMPTS))],
        output_type="pt",
        max_sequence_length=16,
        **FEW_STEPS_CALL,
    )
    gained = output.rewards.nan_to_num(nan=-torch.inf).amax(0) - output.rewards[0]
    return {"first": output.initial_images, "best": output.images, "reward": (gained / spread).tolist()}


def main() -> None:
    from diffusers import DiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--cache", type=Path, help="a .safetensors file to keep the pictures' features in")
    parser.add_argument("--cells", type=Path, help="a .json file to keep what was measured in, to go on from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = _read(options.cells)
    facts, features = scenes_and_features(0, options.cache)
    clip = load_reward("bundled")
    stock = DiffusionPipeline.from_pretrained(asset_path("emoji-scenes"), dtype=torch.bfloat16)
    pipe = NoiseOptimizationPipeline.from_pipe(with_few_steps(stock))
    pipe.set_progress_bar_config(disable=True)
    for seed in range(options.people):
        taste = hidden_taste(facts, seed)
        pairs = pairs_of(taste, PAIRS, 0, torch.Generator().manual_seed(seed))
        for head in HEADS:
            key = f"{seed} {head}"
            if key not in cells:
                reward = fit_personal_reward(features[:POOL], pairs=pairs, head=head, features=clip)
                spread = float(reward.score_features(features).std())
                run = climb(pipe, reward, options.iterations, spread)
                before, unclear = tastes_of(run["first"], facts, seed)
                after, unclear_after = tastes_of(run["best"], facts, seed)
                cells[key] = {
                    "reward": run["reward"],
                    "taste": (after - before).tolist(),
                    "unclear": [unclear, unclear_after],
                }
                if options.cells is not None:
                    write_json(options.cells, cells)
            print(key, {name: np.round(np.mean(value), 3) for name, value in cells[key].items()}, flush=True)
    settings = {"people": options.people, "prompts": len(PROMPTS), "iterations": options.iterations, "pairs": PAIRS}
    write_report("personal_noise", rows_of(cells, options.people), settings | {"cells": cells})


def rows_of(cells: dict[str, Any], people: int) -> list[Row]:
    """The table's rows."""
    rows = []
    gains = {}
    for head in HEADS:
        mine = [cells[f"{seed} {head}"] for seed in range(people)]
        taste = np.concatenate([cell["taste"] for cell in mine])
        reward = np.concatenate([cell["reward"] for cell in mine])
        error = float(taste.std(ddof=1) / len(taste) ** 0.5)
        what = f"hidden taste gained, deviations over scenes: {head} (standard error {error:.2f}), none"
        rows.append(Row(what, float(taste.mean()), 0.0, "above by two errors", bool(taste.mean() > 2 * error)))
        rows.append(Row(f"reward gained likewise: {head}", float(reward.mean()), 0.0, "beside it", True))
        gains[head] = float(taste.mean() / reward.mean())
        unclear = np.sum([cell["unclear"] for cell in mine], 0)
        what = f"pictures that show nothing clear: {head}, after and before"
        rows.append(Row(what, float(unclear[1]), float(unclear[0]), "beside it", True))
    robust, plain = gains["robust"], gains["polished"]
    rows.append(Row("taste per reward gained: robust, polished", robust, plain, "beside it", True))
    return rows


def _read(path: Path | None) -> dict[str, Any]:
    import json

    return json.loads(path.read_text()) if path is not None and path.is_file() else {}


if __name__ == "__main__":
    main()
