"""Policy gradients compared: on small problems, and on the bundled model at equal rollouts.

    python -m trimtab.benchmarks.optim.policy_gradients chain | control | demonstrations | exploration [--seeds 16]
    python -m trimtab.benchmarks.optim.policy_gradients model [--minutes 10] [--seeds 3] [--rollouts 640]
    python -m trimtab.benchmarks.optim.policy_gradients result --folder out/finetune_reward [--captions 134]

The first four are the papers' own toys, at equal trajectories, with the rows where a method loses. ``model``: every
estimator of ``trimtab.recipes.finetune_reward`` from the same weights and for the same number of rollouts, those for
Hessian products among them; how many more were drawn for demonstrations is told. Held-out captions before and after.
Runs that are done are kept, a run that the time cuts off goes on when the command is given again. ``result`` judges
what a finetune has come to, on held-out captions, with the same noises before and after, without noise in the steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from trimtab.assets import FEW_STEPS, asset_path
from trimtab.benchmarks.optim.policy_problems import bandit, chain_gap, control, demonstrations, prompt_policy
from trimtab.benchmarks.optim.report import RESULTS, Row, write_report
from trimtab.commands.pictures import write_json
from trimtab.recipes.emoji_scenes import CATEGORIES, check_scene, sample_facts, write_caption
from trimtab.recipes.finetune_reward import (
    RATES,
    SIGMAS,
    RewardFinetuning,
    finetune_reward,
    load_pipeline,
    load_result,
    scene_reward,
    training_captions,
)
from trimtab.recipes.reward_rollouts import Estimator
from trimtab.recipes.training_loop import TrainingSettings

NAMES = {"pg": "vanilla PG", "adam": "Adam", "momentum": "N-SGD-momentum", "npg_igt": "N-PG-IGT", "n_harpg": "N-HARPG"}
TABLE = {
    "REINFORCE": ("reinforce", {}),
    "GRPO, 2 passes": ("grpo", {"passes": 2}),
    "N-PG-IGT": ("npg_igt", {}),
    "N-HARPG": ("n_harpg", {}),
    "hybrid, gate 0": ("hybrid", {}),
    "hybrid, gate 1/8": ("hybrid", {"gate": 0.125}),
    "hybrid, gate 4/8": ("hybrid", {"gate": 0.5}),
    "hybrid + G2RL": ("hybrid_g2rl", {}),
}


def chain_rows(seeds: int) -> list[Row]:
    """A denoising chain with a closed-form objective: final gaps after 4,000 trajectories."""

    def gap(method: str, lr: float, **options: float) -> float:
        return sum(chain_gap(method, lr, seed, **options) for seed in range(seeds)) / seeds

    rows, igt = [], {}
    for lr, asked in ((0.6, math.inf), (1.0, 1 / 1.5), (2.0, 1 / 2), (4.0, 1 / 2)):
        igt[lr], other = gap("npg_igt", lr), gap("momentum", lr)
        told = "no bar" if asked == math.inf else f"<= 1/{1 / asked:g}"
        rows.append(
            Row(f"chain, gap at lr {lr:g}: N-PG-IGT, N-SGD-momentum", igt[lr], other, told, igt[lr] <= asked * other)
        )
    plain = {lr: gap("pg", lr) for lr in (1.0, 4.0)}
    best = min(igt.values())
    rows.append(Row("chain, gap: N-PG-IGT, vanilla PG at its best rate (loses)", best, plain[4.0], "no bar", True))
    rows.append(
        Row(
            "chain, gap: N-PG-IGT, vanilla PG at a quarter of that",
            best,
            plain[1.0],
            "<= 1/10",
            best <= 0.1 * plain[1.0],
        )
    )
    for scale in (0.01, 100.0):
        ours, other = gap("npg_igt", 2.0, scale=scale), gap("pg", 4.0, scale=scale)
        rows.append(
            Row(f"chain, rewards times {scale:g}: N-PG-IGT, vanilla PG", ours, other, "<= 1/10", ours <= 0.1 * other)
        )
    harpg = min(gap("n_harpg", lr) for lr in (0.6, 1.0, 2.0))
    rows.append(Row("chain, gap: N-HARPG at its best rate, N-PG-IGT (loses)", harpg, best, "no bar", True))
    return rows


def control_rows(seeds: int) -> list[Row]:
    """A bandit, CartPole and a pendulum, at equal pulls or episodes, each method at the better of two rates."""
    tasks = {
        "bandit, P(best)": (
            bandit,
            {"pg": (1.0, 4.0), "adam": (0.1, 0.3), "npg_igt": (0.5, 1.0), "n_harpg": (0.5, 1.0)},
        ),
        "CartPole, return": (
            lambda *call: control("cartpole", *call),
            {"pg": (0.01, 0.003), "adam": (0.03, 0.01), "npg_igt": (0.15, 0.3), "n_harpg": (0.15, 0.3)},
        ),
        "pendulum, return": (
            lambda *call: control("pendulum", *call),
            {"pg": (1e-3, 1e-4), "adam": (0.1, 0.3), "npg_igt": (0.15, 0.3), "n_harpg": (0.15, 0.3)},
        ),
    }
    rows = []
    for title, (play, rates) in tasks.items():
        found = {
            m: max(sum(play(m, lr, seed) for seed in range(seeds)) / seeds for lr in lrs) for m, lrs in rates.items()
        }
        print(title, {m: round(v, 4) for m, v in found.items()}, flush=True)
        rows += [
            Row(f"{title}: {NAMES[m]}, Adam", found[m], found["adam"], "no bar", True)
            for m in ("pg", "npg_igt", "n_harpg")
        ]
    return rows


def demonstration_rows(seeds: int) -> list[Row]:
    """Rollouts, demonstrations that are right half of the time, and the gate between them."""
    plain = {m: demonstrations(m, seeds) for m in ("rl", "sft", "sum", "sft_then_rl")}
    rows = []
    for gate in (0.0, 0.125, 0.5):
        ours = demonstrations("hybrid", seeds, gate=gate)
        asked, holds = (">= .93", ours >= 0.93) if gate < 0.5 else ("no bar", True)
        rows.append(Row(f"prompts, 100 steps: hybrid gate {gate:g}, RL", ours, plain["rl"], asked, holds))
    ours = rows[0].ours
    for m, told in (("sft", "SFT"), ("sum", "SFT + RL"), ("sft_then_rl", "33 steps of SFT, then RL")):
        asked, holds = ("no bar", True) if m == "sft_then_rl" else ("baseline <= .70", plain[m] <= 0.7)
        rows.append(Row(f"prompts, 100 steps: hybrid gate 0, {told}", ours, plain[m], asked, holds))
    wrong = {m: demonstrations(m, seeds, actions=50, fixed_wrong=0.25, steps=300) for m in ("rl", "hybrid")}
    rows.append(
        Row(
            "prompts, a quarter of demonstrations always wrong: hybrid, RL (loses)",
            wrong["hybrid"],
            wrong["rl"],
            "no bar",
            True,
        )
    )
    return rows


def exploration_rows(seeds: int) -> list[Row]:
    """A prompt policy with three right clusters: how many stay in use, and P(right)."""
    settings = {
        "GRPO": {"strength": 0.0, "normalize": "std"},
        "G2RL": {"strength": 1.0, "normalize": "std"},
        "GRPO, no division": {"strength": 0.0, "normalize": "none"},
        "G2RL, no division": {"strength": 1.0, "normalize": "none"},
        "entropy bonus": {"strength": 0.0, "normalize": "std", "entropy": 0.1},
    }
    rows = []
    for steps in (100, 300):
        found = {
            name: [
                sum(v) / seeds for v in zip(*(prompt_policy(s, steps=steps, **o) for s in range(seeds)), strict=True)
            ]
            for name, o in settings.items()
        }
        print(steps, found, flush=True)
        ours, plain, bonus = found["G2RL"], found["GRPO"], found["entropy bonus"]
        rows += [
            Row(
                f"right clusters of 3 in use, {steps} steps: G2RL, GRPO",
                ours[1], plain[1], ">= 1.25 x", ours[1] >= 1.25 * plain[1],
            ),
            Row(f"P(right), {steps} steps: G2RL, GRPO", ours[0], plain[0], ">= .98", ours[0] >= 0.98),
            Row(f"clusters, {steps} steps: G2RL, entropy bonus .1 (loses)", ours[1], bonus[1], "no bar", True),
            Row(f"P(right), {steps} steps: G2RL, entropy bonus .1", ours[0], bonus[0], "no bar", True),
            Row(
                f"clusters, {steps} steps, no division: G2RL, GRPO",
                found["G2RL, no division"][1], found["GRPO, no division"][1], "no bar", True,
            ),
        ]  # fmt: skip
    return rows


PROBLEMS = {
    "chain": chain_rows,
    "control": control_rows,
    "demonstrations": demonstration_rows,
    "exploration": exploration_rows,
}


def held_out_captions(category: str, count: int, seed: int = 5) -> list[str]:
    """Different captions of facts that neither training nor finetuning sees; all where there are fewer."""
    rng, found = np.random.default_rng([seed, 13]), {}
    for _ in range(40 * count):
        found[write_caption(sample_facts(rng, category, held_out=True))] = None
        if len(found) == count:
            break
    return list(found)


def judged(pipe: StableDiffusion3Pipeline, captions: list[str], first_seed: int = 0) -> list[tuple[bool, bool]]:
    """Whether each caption's picture shows its objects in their number, and whether all of it is right."""
    found = []
    for start in range(0, len(captions), 16):
        part = captions[start : start + 16]
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        images = pipe(
            part,
            sigmas=list(SIGMAS),
            guidance_scale=1.0,
            max_sequence_length=16,
            generator=generators,
            output_type="pt",
        ).images
        found += [(verdict.shown, verdict.correct) for verdict in check_scene(images, part)]
    return found


def paired(before: list[bool], after: list[bool]) -> tuple[float, float, float]:
    """Gain in points, and its interval of 95% by the normal law of paired differences."""
    gain = 100.0 * (np.asarray(after, float) - np.asarray(before, float))
    half = 1.96 * gain.std(ddof=1) / math.sqrt(len(gain))
    return float(gain.mean()), float(gain.mean() - half), float(gain.mean() + half)


def result(folder: Path, category: str, captions: int, others: int, out: Path) -> tuple[list[Row], dict]:
    """Rows of a finetune's averaged weights against the model it began from; pictures judged are kept in ``out``."""
    state = json.loads(out.read_text()) if out.exists() else {}
    counts = {name: captions if name == category else others for name in CATEGORIES}
    asked = {name: held_out_captions(name, count) for name, count in counts.items() if count}
    pipe = load_pipeline(asset_path("emoji-scenes"), FEW_STEPS)
    for when in ("before", "after"):
        steps = 0 if when == "before" else load_result(pipe, folder)
        for name in sorted(asked, key=lambda name: name != category):
            key = f"{when} {steps} {name}"
            done = state.setdefault(key, [])
            for start in range(len(done), len(asked[name]), 16):
                done += judged(pipe, asked[name][start : start + 16], start)
                write_json(out, state)
            shares = [sum(column) / len(done) for column in zip(*done, strict=True)]
            print(f"{key}: shown {shares[0]:.3f}, all right {shares[1]:.3f} of {len(done)}", flush=True)
    rows, figures = [], {"steps": steps}
    for name in asked:
        both = zip(
            *(zip(*state[f"{w} {s} {name}"], strict=True) for w, s in (("before", 0), ("after", steps))), strict=True
        )
        for what, (old, new) in zip(("shown", "all right"), both, strict=True):
            gain, low, high = paired(list(old), list(new))
            bar = name == category and what == "shown"
            told = f"{'+8 points' if bar else 'no bar'}; {gain:+.1f} [{low:+.1f}, {high:+.1f}]"
            share = [100 * sum(v) / len(v) for v in (new, old)]
            rows.append(
                Row(f"reward finetune, held-out {name}, {what} (%): after, before", *share, told, not bar or gain >= 8)
            )
            figures[f"{name}, {what}"] = {"pictures": len(old), "gain": gain, "interval": [low, high]}
    return rows, figures


def model(rollouts: int, seeds: int, minutes: float, captions: int, folder: Path) -> tuple[list[Row], dict]:
    """Rows of each estimator's gain on held-out counts at equal rollouts, as far as the time goes."""
    out, started = folder / "table.json", time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    state = json.loads(out.read_text()) if out.exists() else {}
    asked = held_out_captions("count", captions)

    def left() -> float:
        return 60 * minutes - (time.monotonic() - started)

    for seed in range(seeds):
        for title, (name, options) in {"before": ("", {}), **TABLE}.items():
            key = f"{seed} {title} {rollouts}"
            if key in state or left() <= 0:
                continue
            pipe = load_pipeline(asset_path("emoji-scenes"), FEW_STEPS)
            drawn = 0
            if name:
                place = folder / key.replace(" ", "_").replace("/", "of")
                drawn = run(pipe, name, options, seed, rollouts, place, left())
            if drawn is None:
                continue
            state[key] = {"drawn": drawn, "judged": judged(pipe, asked, 10_000 * seed)}
            write_json(out, state)
            print(key, state[key]["drawn"], sum(v[0] for v in state[key]["judged"]) / captions, flush=True)
    rows = []
    for title in TABLE:
        pairs = [
            [state[f"{seed} {t} {rollouts}"]["judged"] for t in ("before", title)]
            for seed in range(seeds)
            if f"{seed} {title} {rollouts}" in state and f"{seed} before {rollouts}" in state
        ]
        if pairs:
            old, new = ([v[0] for pair in pairs for v in pair[i]] for i in range(2))
            gain, low, high = paired(old, new)
            drawn = sum(state[f"{seed} {title} {rollouts}"]["drawn"] for seed in range(len(pairs))) / len(pairs)
            told = f"no bar; {gain:+.1f} [{low:+.1f}, {high:+.1f}], {drawn:.0f} drawn, {len(pairs)} seed(s)"
            rows.append(
                Row(
                    f"counts shown (%) after {rollouts} rollouts: {title}, before",
                    100 * np.mean(new),
                    100 * np.mean(old),
                    told,
                    True,
                )
            )
    return rows, {"rollouts": rollouts, "captions": captions, "runs": sorted(state)}


def run(pipe, name: str, options: dict, seed: int, rollouts: int, folder: Path, seconds: float) -> int | None:
    """Finetunes for so many rollouts; gives how many were drawn in all, None where the time ended it."""
    training = TrainingSettings(
        rollouts // 32 // (2 if name.endswith("harpg") else 1), 32, RATES.get(name, 2e-3), warmup_steps=0,
        weight_decay=0.0, decay_start=0.99, ema_decay=0.8, mixed_precision="no", log_every=1, checkpoint_seconds=60.0,
        seed=seed,
    )  # fmt: skip
    settings = RewardFinetuning(training, Estimator(name, **options))
    captions = training_captions(["count"], 256, seed)
    if not finetune_reward(pipe, captions, scene_reward(), settings, folder, max_seconds=seconds):
        return None
    rows = {(row := json.loads(line))["step"]: row["drawn"] for line in (folder / "log.jsonl").read_text().splitlines()}
    return int(sum(rows.values()))


def main() -> None:
    """Measures and writes; the other parts' rows of the last run are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=(*PROBLEMS, "model", "result"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rollouts", type=int, default=640)
    parser.add_argument("--captions", type=int, default=128, help="held-out ones of the category")
    parser.add_argument("--others", type=int, default=32, help="held-out captions of each other category")
    parser.add_argument("--category", choices=CATEGORIES, default="count")
    parser.add_argument("--folder", type=Path, default=Path("out/finetune_reward"))
    args = parser.parse_args()
    if args.rollouts < 64:
        parser.error(f"--rollouts is {args.rollouts}; takes 64 or more, two draws of 32")
    if args.part in PROBLEMS:
        rows, details = PROBLEMS[args.part](args.seeds), {"seeds": args.seeds}
    elif args.part == "model":
        rows, details = model(args.rollouts, args.seeds, args.minutes, args.captions, args.folder)
    else:
        rows, details = result(args.folder, args.category, args.captions, args.others, args.folder / "judged.json")
    path = RESULTS / "policy_gradients.json"
    parts = json.loads(path.read_text())["settings"] if path.exists() else {}
    parts[args.part] = {"rows": [vars(row) for row in rows], **details}
    write_report("policy_gradients", [Row(**row) for part in parts.values() for row in part["rows"]], parts)


if __name__ == "__main__":
    main()
