"""``trimtab tune``: settings of guidance or of noise optimization, found on prompts under a judge, as a preset."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.commands.edit import sequence_length
from trimtab.commands.errors import UsageError, first_line
from trimtab.commands.generate import _positive, _prompts, _seed
from trimtab.commands.model import add_model_arguments, check_model, load_pipeline
from trimtab.commands.pictures import write_json
from trimtab.commands.words import report_unknown_words

__all__ = ["add_parser", "run"]

WHAT = ("guidance", "noise")


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "tune",
        help="settings found on prompts under a judge, written as a preset",
        description="Looks for guidance scale, threshold and momentum of APG, or for the step of noise optimization, "
        "by consensus hopping: nothing needs a gradient. Writes a preset that `generate --guidance FILE`, "
        "`optimize --preset FILE`, AdaptiveProjectedGuidance.from_preset and `preset=` of the pipelines take. "
        "What was judged is kept beside it, so an interrupted run goes on where it was.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to tune on")
    add("--prompt-file", metavar="FILE", help="a text file with a prompt a line, besides those given")
    add("--held-out-file", metavar="FILE", help="prompts on which default and result are compared at the end")
    add("--what", choices=WHAT, default="guidance", help="default: guidance")
    add(
        "--judge",
        default="bundled",
        metavar="NAME",
        help="a reward by name, folder or Hub id, higher is better; right-share checks the bundled model's captions "
        "(default: bundled)",
    )
    add("--reward", default="bundled", metavar="NAME", help="with --what noise, what the noise climbs")
    add("--num-optimization-steps", type=_positive, default=10, metavar="N", help="with --what noise (default: 10)")
    add("--evaluations", type=_positive, default=32, metavar="N", help="settings that are tried (default: 32)")
    add("--particles", type=_positive, default=8, metavar="N", help="of them in each hop (default: 8)")
    add("--steps", type=_positive, default=20, metavar="N", help="steps of the scheduler (default: 20)")
    add("--seed", type=_seed, default=0, metavar="SEED", help="of the first prompt's noise (default: 0)")
    add("--batch-size", type=_positive, default=8, metavar="N", help="pictures at once (default: 8)")
    add_model_arguments(parser)
    add("--output", default="preset.json", metavar="FILE", help="ends in .json (default: preset.json)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Tunes and writes the preset.

    Raises:
        UsageError: if an argument cannot be used; nothing was written then.
    """
    prompts = _prompts(args.prompts, args.prompt_file)
    held_out = [] if args.held_out_file is None else _prompts([], args.held_out_file)
    path = _output(args.output)
    if args.evaluations < 2 or args.particles < 2:
        raise UsageError("--evaluations and --particles take 2 or more")
    model = check_model(args.model)
    asked = {name: getattr(args, name) for name in _DECIDES} | {"prompts": prompts, "model": model}
    log = path.with_suffix(".log.json")
    known = _known(log, asked)

    import torch

    from trimtab.guidance import TunedPreset
    from trimtab.pipelines.tuning import tune
    from trimtab.rewards import load_reward

    pipe = load_pipeline(model, args.dtype, args.device)
    pipe.set_progress_bar_config(disable=True)
    report_unknown_words(pipe, [*prompts, *held_out])
    try:
        judge = load_reward(args.judge, device=pipe.device)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(f"--judge: {first_line(error)}") from error
    knobs, judged_on = _what(args, pipe, judge, model)
    values = list(known)

    def note(settings: dict[str, float], value: float) -> None:
        values.append(value)
        write_json(log, {"asked": asked, "values": values})
        shown = ", ".join(f"{name} {setting:.4g}" for name, setting in settings.items())
        print(f"{len(values)} of {args.evaluations}: {shown}: {value:.4f}", flush=True)

    try:
        found = tune(
            judged_on(prompts),
            knobs,
            evaluations=args.evaluations,
            num_particles=args.particles,
            seed=args.seed,
            known=known,
            on_evaluation=note,
        )
        record = {**asked, "value": found.value, "default_value": found.default_value}
        defaults = found.history[0][0]
        if held_out:
            judged = judged_on(held_out)
            record["held_out"] = {
                "prompts": held_out,
                "value": judged(found.settings),
                "default_value": judged(defaults),
            }
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{args.batch_size} pictures at once are too many: {first_line(error)}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(first_line(error)) from error
    TunedPreset(**{args.what: found.settings}, tuned=record).save(path)
    print(f"{path}  judged {found.default_value:.4f} at the default, {found.value:.4f} tuned", flush=True)
    if held_out:
        values_there = record["held_out"]
        before, after = values_there["default_value"], values_there["value"]
        verdict = "better" if after > before else "NOT better: keep the default"
        print(f"on {len(held_out)} held-out prompts {before:.4f} and {after:.4f}: {verdict}", flush=True)


_DECIDES = ("what", "judge", "reward", "num_optimization_steps", "evaluations", "particles", "steps", "seed", "dtype")
"""What the values of earlier evaluations depend on, besides prompts and model."""


def _what(args: argparse.Namespace, pipe: Any, judge: Any, model: str) -> tuple[dict[str, Any], Callable[..., Any]]:
    """The knobs, and what judges settings on prompts."""
    import dataclasses

    from trimtab.guidance import PRESETS
    from trimtab.pipelines import NoiseOptimizationPipeline
    from trimtab.pipelines.tuning import GUIDANCE_KNOBS, NOISE_KNOBS, guidance_judgement, noise_judgement

    common = {"seed": args.seed, "batch_size": args.batch_size, "num_inference_steps": args.steps}
    common |= sequence_length(pipe)
    if args.what == "guidance":
        preset = PRESETS.get(Path(model).name, {})
        knobs = {name: dataclasses.replace(knob, default=min(max(preset.get(name, knob.default), knob.low), knob.high))
                 for name, knob in GUIDANCE_KNOBS.items()}  # fmt: skip
        return knobs, lambda prompts: guidance_judgement(pipe, prompts, judge, **common)
    made = NoiseOptimizationPipeline.from_pipe(pipe, reward=args.reward)
    made.set_progress_bar_config(disable=True)
    common["num_optimization_steps"] = args.num_optimization_steps
    return dict(NOISE_KNOBS), lambda prompts: noise_judgement(made, prompts, judge, **common)


def _output(given: str) -> Path:
    path = Path(given).expanduser()
    if path.suffix != ".json":
        raise UsageError(f"--output takes a file that ends in .json; got {given}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--output: {path.absolute().parent} is no folder")
    return path


def _known(log: Path, asked: dict[str, Any]) -> list[float]:
    """What an interrupted run of the same arguments had judged."""
    try:
        content = json.loads(log.read_text(encoding="utf-8"))
        known = [float(value) for value in content["values"]] if content.get("asked") == asked else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    if known:
        print(f"{len(known)} settings were judged before", file=sys.stderr)
    return known
