"""How soon a personal reward agrees with a simulated person: ``python -m trimtab.benchmarks.optim.personal_reward``.

The claim: with 200 pairs the polished network is at least five points above a linear probe on held-out pairs and
within a standard error of AdamW's, never above its training objective; with 40 it is not below the linear probe.

A simulated person has a hidden taste over what an EmojiScenes picture shows, not linear in it: 1.5 where a warm ground
has a shape or a cold one a thing (and -1.5 otherwise), 0.7 for several objects, and normal likings, of deviation 0.5,
of each ground and of each object. They choose between 20 to 400 pairs of 800 pictures; the rewards see the pictures'
emoji-clip features alone. Held-out pairs are of 800 other pictures. 20 people (seeds). The linear probe has the same
features and directions; a second one has up to 48 directions, which serve it better.

Features, width and weight decay were chosen on the pictures and people of `--development`.

    python -m trimtab.benchmarks.optim.personal_reward [--seeds 20] [--counts 40 200] [--cache features.safetensors]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.benchmarks.optim.report import Row, print_rows, write_report
from trimtab.optim.solvers import fit_preference_head, polish
from trimtab.recipes.emoji_scenes import OBJECTS, SceneFacts, sample_scene
from trimtab.rewards import load_reward
from trimtab.rewards.personal import FeatureSpace, picture_features
from trimtab.rewards.personal_fit import LINEAR_DECAY, POLISH, network_decay, train_network
from trimtab.rewards.personal_votes import Votes

POOL, COUNTS, WIDTH, WIDE = 800, (20, 40, 80, 200, 400), 16, 48
DEVELOPMENT = 1000
"""The first number of the seeds of people and pictures on which choices were made."""
WARM = ("pink", "sand", "white", "lavender")


def scenes_and_features(seed: int = 0, cache: Path | None = None) -> tuple[list[SceneFacts], Tensor]:
    """What 1600 pictures show, and their features of length 1, which are kept in the file `cache`."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(2 * POOL)]
    facts = [scene.facts for scene in scenes]
    if cache is not None and cache.is_file():
        return facts, load_file(cache)[str(seed)]
    clip, parts = load_reward("bundled"), []
    for start in range(0, len(scenes), 64):
        pictures = np.stack([scene.render(128) for scene in scenes[start : start + 64]])
        parts.append(picture_features(clip, torch.from_numpy(pictures).permute(0, 3, 1, 2)))
    features = torch.cat(parts)
    if cache is not None:
        save_file({str(seed): features}, cache)
    return facts, features


def hidden_taste(facts: Sequence[SceneFacts], seed: int) -> Tensor:
    """A person's liking of scenes, (N,)."""
    rng = np.random.default_rng(seed)
    grounds: dict[str, float] = {}
    objects: dict[str, float] = {}
    values = []
    for each in facts:
        fits = (each.background in WARM) != (OBJECTS[each.objects[0]].colour is None)
        several = each.count > 1 or len(each.objects) > 1
        liking = float(np.mean([objects.setdefault(name, rng.normal()) for name in each.objects]))
        ground = grounds.setdefault(each.background, rng.normal())
        values.append(1.5 * (1 if fits else -1) + 0.7 * (1 if several else -1) + 0.5 * (ground + liking))
    return torch.tensor(values)


def pairs_of(taste: Tensor, count: int, first: int, generator: torch.Generator) -> Tensor:
    """Pairs (count, 2) of pictures from `first` on, the preferred one first."""
    pairs = torch.randint(first, first + POOL, (2 * count, 2), generator=generator)
    pairs = pairs[taste[pairs[:, 0]] != taste[pairs[:, 1]]][:count]
    return torch.where((taste[pairs[:, 0]] > taste[pairs[:, 1]])[:, None], pairs, pairs.flip(1))


def person(features: Tensor, taste: Tensor, count: int, seed: int) -> dict[str, float]:
    """Agreement of each head on held-out pairs, seconds of the thread, and objectives."""
    generator = torch.Generator().manual_seed(seed)
    held = pairs_of(taste, 4000, POOL, generator)
    pairs = pairs_of(taste, count, 0, generator)
    used, places = torch.unique(pairs, return_inverse=True)
    votes = Votes(torch.ones(count, dtype=torch.float64), places)

    def agreement(head: torch.nn.Module, space: FeatureSpace) -> float:
        with torch.no_grad():
            f = head(space(features).double())[:, 0]
        return float((f[held[:, 0]] > f[held[:, 1]]).double().mean())

    def directions(most: int) -> tuple[FeatureSpace, Tensor]:
        space = FeatureSpace.of(features[used], max(1, min(most, count // 4)))
        return space, space(features[used]).double()

    def linear(most: int) -> float:
        space, z = directions(most)
        head = fit_preference_head(z[places[:, 0]], z[places[:, 1]], l2=LINEAR_DECAY / count)
        return agreement(head, space)

    start = time.thread_time()
    space, z = directions(WIDTH)
    beta = network_decay(count)
    network = train_network(z, votes, beta, torch.Generator().manual_seed(0))
    result = polish(network, z, None, beta=beta, loss="logistic", pairs=places, **POLISH)
    seconds = time.thread_time() - start
    return {
        "seconds": seconds,
        "linear": linear(WIDTH),
        "linear, wide": linear(WIDE),
        "AdamW": agreement(network, space),
        "polished": agreement(result.module, space),
        "objective of AdamW": result.before,
        "objective polished": result.after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--cache", type=Path, help="a .safetensors file to keep the pictures' features in")
    parser.add_argument("--development", action="store_true", help="other pictures and people; nothing is written")
    options = parser.parse_args()
    seeds, first = options.seeds, DEVELOPMENT if options.development else 0
    torch.set_num_threads(1)
    facts, features = scenes_and_features(first, options.cache)
    rows = []
    for count in options.counts:
        runs = [person(features, hidden_taste(facts, seed), count, seed) for seed in range(first, first + seeds)]
        mean = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        error = {name: float(np.std([run[name] for run in runs], ddof=1) / seeds**0.5) for name in runs[0]}
        print(count, {name: f"{mean[name]:.4f} +- {error[name]:.4f}" for name in mean}, flush=True)
        gain = mean["polished"] - mean["linear"]
        asked, holds = {200: ("at least 0.05 above", gain >= 0.05), 40: ("not below", gain >= 0)}.get(
            count, ("beside it", True)
        )
        rows.append(Row(f"agreement, {count} pairs: polished, linear", mean["polished"], mean["linear"], asked, holds))
        wide = mean["linear, wide"]
        what = f"agreement, {count} pairs: polished, linear on {min(WIDE, count // 4)} directions"
        rows.append(Row(what, mean["polished"], wide, "beside it", True))
        within = mean["polished"] >= mean["AdamW"] - error["AdamW"]
        rows.append(
            Row(
                f"agreement, {count} pairs: polished, AdamW (standard error {error['AdamW']:.4f})",
                mean["polished"],
                mean["AdamW"],
                "within one standard error",
                within,
            )
        )
        worst = max(run["objective polished"] / run["objective of AdamW"] for run in runs)
        what = f"objective, {count} pairs: polished to AdamW, mean and worst person"
        ratio = float(np.mean([run["objective polished"] / run["objective of AdamW"] for run in runs]))
        rows.append(Row(what, ratio, worst, "never above 1", worst <= 1 + 1e-9))
        rows.append(Row(f"seconds to fit, {count} pairs", mean["seconds"], 2.0, "below 2", mean["seconds"] < 2))
    if options.development:
        print_rows(rows)
        return
    settings = {"seeds": seeds, "pool": POOL, "width": WIDTH, "decay": [network_decay(n) for n in options.counts]}
    write_report("personal_reward", rows, settings)


if __name__ == "__main__":
    main()
