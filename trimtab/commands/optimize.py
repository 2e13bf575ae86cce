"""``trimtab optimize``: prompts in, pictures out whose noise was moved until rewards like them."""

import argparse
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab.commands.edit import sequence_length
from trimtab.commands.errors import UsageError, first_line
from trimtab.commands.few_steps import FEW_STEPS_CALL, with_few_steps
from trimtab.commands.generate import _check_size, _positive, _scale, _seed
from trimtab.commands.model import add_model_arguments, check_model, load_pipeline, stated_size_multiple
from trimtab.commands.optimize_curvature import curvatures, report_curvature
from trimtab.commands.optimize_jobs import optimize_jobs, reward_weights
from trimtab.commands.pictures import check_folder, save_png, write_json
from trimtab.commands.words import report_unknown_words

__all__ = ["add_parser", "optimize", "run"]

GUIDED_CALL = {"num_inference_steps": 8, "guidance_scale": 5.0}
"""Of the bundled model where a flag asks for steps or guidance: its own transformer is blurred at fewer steps."""

_OF_THE_RUN = ("num_optimization_steps", "optimizer", "gradient", "preset", "monitor_patience")


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "optimize",
        help="pictures whose noise is optimized against rewards",
        description="Moves the noise of a frozen model until rewards like the picture. Writes the best picture, a "
        "strip of the improvements, the curve of the reward and a JSON of all figures. Pictures whose JSON is in the "
        "folder already are left alone, so an interrupted run goes on where it was.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to show")
    add("--jobs", metavar="FILE", help="a JSONL file: prompt a line, and seed, negative_prompt, reward_prompt")
    add("--negative-prompt", metavar="TEXT", help="what to guide away from")
    add(
        "--reward",
        action="append",
        metavar="NAME[=WEIGHT]",
        help="what to climb: bundled, clip, pickscore, hpsv2.1, imagereward, aesthetic, reno (the paper's mix), a "
        "folder or a Hub id; several times for a weighted sum (default: bundled)",
    )
    add(
        "--weighting",
        choices=("sum", "worst-case"),
        default="sum",
        help="of several rewards: their sum, or worst-case, which raises the smallest gain and sacrifices none; their "
        "weights are then scales at which gains are compared (default: sum)",
    )
    add("--monitor", metavar="NAME", help="a held-out reward to report")
    add("--monitor-patience", type=_positive, metavar="N", help="end a picture once it has not risen for N iterations")
    add("--num-optimization-steps", type=_positive, default=50, metavar="N", help="iterations (default: 50)")
    add(
        "--optimizer",
        default="gradient",
        metavar="NAME",
        help="gradient, or without a gradient best-of-n, consensus, directional or cma (default: gradient)",
    )
    add("--gradient", default="full", metavar="NAME", help="full or jacobian-free (default: full)")
    add("--preset", metavar="NAME", help="settings by name, such as paper, or a .json file of `trimtab tune`")
    add("--learning-rate", type=float, metavar="LR", help="of the gradient's optimizer (default: the preset's)")
    add("--curvature", action="store_true", help="report the reward's curvature at the noise found, and draw it")
    add("--num-images", type=_positive, default=1, metavar="N", help="pictures a prompt (default: 1)")
    add("--seed", type=_seed, default=0, metavar="SEED", help="of a prompt's first picture (default: 0)")
    add(
        "--steps",
        type=_positive,
        metavar="N",
        help="of the sampler (default: the preset's, else 4; the bundled model then uses its distilled transformer)",
    )
    add("--guidance-scale", type=_scale, metavar="W", help="default: the preset's, or the pipeline's own")
    add("--height", type=_positive, metavar="PIXELS", help="default: the model's")
    add("--width", type=_positive, metavar="PIXELS", help="default: the model's")
    add("--batch-size", type=_positive, default=1, metavar="N", help="pictures at once (default: 1)")
    add_model_arguments(parser)
    add("--output", default="out", metavar="FOLDER", help="made if missing (default: out)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Makes the pictures.

    Raises:
        UsageError: if an argument cannot be used; nothing was written then.
        KeyboardInterrupt: when interrupted, after the best pictures so far were written.
    """
    if args.learning_rate is not None and not 0 < args.learning_rate < float("inf"):
        raise UsageError(f"--learning-rate takes a number above 0; got {args.learning_rate:g}")
    jobs = optimize_jobs(args)
    weights = reward_weights(args.reward or ["bundled"])
    if args.weighting == "worst-case" and (isinstance(weights, str) or sum(map(bool, weights.values())) < 2):
        raise UsageError("--weighting worst-case takes two or more --reward NAME[=WEIGHT] whose weights are not 0")
    folder = check_folder(args.output)
    model = check_model(args.model)
    _check_size(args, stated_size_multiple(model))
    settings = _settings(args, weights)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    mine = [(name, {**job, **settings}) for index, (name, job) in enumerate(jobs) if index % world == rank]
    todo = [(name, job) for name, job in mine if not _is_done(folder / f"{name}.json", job)]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} pictures are in {folder} already", file=sys.stderr)
    if not todo:
        return

    from trimtab.pipelines import NoiseOptimizationPipeline
    from trimtab.pipelines.families import size_multiple

    stock = load_pipeline(model, args.dtype, args.device)
    if _few_steps(settings):
        stock = with_few_steps(stock)
    _check_size(args, size_multiple(stock))
    pipe = NoiseOptimizationPipeline.from_pipe(stock, reward=_reward(weights, stock.device, weighting=args.weighting))
    monitor = None if args.monitor is None else _reward(args.monitor, stock.device, "--monitor")
    report_unknown_words(pipe, [text for _, job in todo for text in (job["prompt"], job["negative_prompt"] or "")])
    pipe.set_progress_bar_config(desc="iterations", leave=False, disable=None)
    for batch in _batches(todo, args.batch_size):
        for line in optimize(pipe, batch, folder, monitor=monitor):
            print(line, flush=True)


def optimize(pipe: Any, batch: list[tuple[str, dict[str, Any]]], folder: Path, *, monitor: Any = None) -> Iterator[str]:
    """Makes pictures of one batch and writes their files, each JSON last.

    Args:
        pipe: a noise-optimizing pipeline with a reward.
        batch: names and settings, alike but for prompt, seed and texts.
        folder: where to, made if missing.
        monitor: a held-out reward.

    Yields:
        A line for each picture: its strip's file and what became of the reward.

    Raises:
        UsageError: if the pipeline refuses an argument.
        KeyboardInterrupt: when interrupted, after the files were written.
    """
    import torch

    from trimtab.commands.optimize_report import Improvements

    start, improvements = time.perf_counter(), Improvements()
    common = batch[0][1]
    texts = {key: [job[key] for _, job in batch] for key in ("prompt", "negative_prompt", "reward_prompt")}
    told = [text or prompt for text, prompt in zip(texts["reward_prompt"], texts["prompt"], strict=True)]
    negative = None if texts["negative_prompt"][0] is None else texts["negative_prompt"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what it tells is in the files and in the lines
            result = pipe(
                texts["prompt"],
                negative_prompt=negative,
                reward_prompt=told,
                generator=[torch.Generator("cpu").manual_seed(job["seed"]) for _, job in batch],
                monitor=monitor,
                callback_on_iteration_end=improvements,
                output_type="pil",
                **_call(pipe, common),
            )
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{len(batch)} pictures at once are too many: {first_line(error)}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(first_line(error)) from error
    folder.mkdir(parents=True, exist_ok=True)
    seconds = round(time.perf_counter() - start, 3)
    spectra = [None] * len(batch)
    if common.get("curvature") and not result.interrupted:
        spectra = curvatures(pipe, result.latents, [job for _, job in batch], _call(pipe, common))
    for row, (name, job) in enumerate(batch):
        yield _write(result, row, job, folder / name, improvements, seconds, spectra[row])
    if result.interrupted:
        raise KeyboardInterrupt


def _write(
    result: Any, row: int, job: Mapping[str, Any], stem: Path, improvements: Any, seconds: float, spectrum: Any = None
) -> str:
    from trimtab.commands.optimize_report import curve

    def column(values: Any) -> list[float | None]:
        return [value if value == value else None for value in values[:, row].tolist()]  # JSON has no NaN

    best = int(result.best_step[row])
    rewards = result.rewards[:, row].tolist()
    watched = None if result.monitor is None else result.monitor[:, row].tolist()
    paths = [stem.with_name(stem.name + ending) for ending in (".png", "-strip.png", "-rewards.png", ".json")]
    made_by = {"prompt": job["prompt"], "seed": job["seed"], "settings": dict(job)}
    save_png(result.images[row], paths[0], made_by)
    save_png(improvements.strip(row, best), paths[1], made_by)
    save_png(curve(rewards, watched), paths[2], made_by)
    content = {
        "job": dict(job),
        "best_step": best,
        "initial_reward": column(result.rewards)[0],
        "best_reward": column(result.rewards)[best],
        "rewards": column(result.rewards),
        "terms": {name: column(values) for name, values in result.terms.items()},
        "monitor": None if result.monitor is None else column(result.monitor),
        "norms": column(result.norms),
        "stopped": result.stopped[row],
        "interrupted": result.interrupted,
        "evaluations": result.num_evaluations,
        "seconds": seconds,
        "files": [path.name for path in paths[:3]],
    }
    ended = f" ({result.stopped[row]})" if result.stopped[row] else ""
    if spectrum is not None:
        drawing = stem.with_name(stem.name + "-curvature.png")
        content["curvature"] = report_curvature(spectrum, drawing, made_by)
        content["files"].append(drawing.name)
        ended += f", curvature up to {spectrum.lambda_max:.3g}: steps below {spectrum.max_learning_rate:.3g} are stable"
    write_json(paths[3], content)
    return f"{paths[1]}  reward {rewards[0]:.4g} -> {rewards[best]:.4g} at iteration {best}{ended}"


def _settings(args: argparse.Namespace, weights: str | dict[str, float]) -> dict[str, Any]:
    """What all pictures of a command have alike."""
    names = (
        "num_optimization_steps",
        "optimizer",
        "weighting",
        "gradient",
        "preset",
        "learning_rate",
        "monitor",
        "monitor_patience",
    )
    return {
        "model": args.model or "bundled",
        "dtype": args.dtype,
        "reward": weights,
        **{name: getattr(args, name) for name in (*names, "steps", "guidance_scale", "height", "width")},
        **({"curvature": True} if args.curvature else {}),
    }


def _few_steps(job: Mapping[str, Any]) -> bool:
    """Whether pictures are made by the bundled model's distilled transformer: where nothing asks for its own."""
    asked = job["steps"] is not None or job["guidance_scale"] is not None or _has_call(job["preset"])
    return job["model"] == "bundled" and not asked


def _has_call(preset: str | None) -> bool:
    """Whether a preset says how a model is to be called; one that is none is refused by the pipeline."""
    from trimtab.pipelines.noise_presets import NOISE_PRESETS

    return preset in NOISE_PRESETS and bool(NOISE_PRESETS[preset].call)


def _call(pipe: Any, job: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline's call: what was asked for, over the preset's, over the bundled model's."""
    options = {
        "num_inference_steps": job["steps"],
        "guidance_scale": job["guidance_scale"],
        "height": job["height"],
        "width": job["width"],
    }
    call = {name: value for name, value in options.items() if value is not None}
    if not _has_call(job["preset"]):
        of_bundled = FEW_STEPS_CALL if _few_steps(job) else GUIDED_CALL
        call = {**(of_bundled if job["model"] == "bundled" else {"num_inference_steps": 4}), **call}
    if job["learning_rate"] is not None:
        call["optimizer_kwargs"] = {"lr": job["learning_rate"]}
    return {**sequence_length(pipe), **call, **{name: job[name] for name in _OF_THE_RUN}}


def _reward(given: Any, device: Any, flag: str = "--reward", weighting: str = "sum") -> Any:
    from trimtab.rewards import WeightedReward, load_reward

    try:
        if isinstance(given, str):
            return load_reward(given, device=device)
        return WeightedReward(given, weighting=weighting, device=device)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(f"{flag}: {first_line(error)}") from error


def _batches(jobs: list[tuple[str, dict[str, Any]]], size: int) -> Iterable[list[tuple[str, dict[str, Any]]]]:
    """Jobs in their order, at most so many at once; with a negative prompt or without are not mixed."""
    for _, group in itertools.groupby(jobs, key=lambda item: item[1]["negative_prompt"] is None):
        items = list(group)
        for start in range(0, len(items), size):
            yield items[start : start + size]


def _is_done(path: Path, job: Mapping[str, Any]) -> bool:
    """Whether the JSON of just this picture is there, which is written last, and was not cut short."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content.get("job") == dict(job) and not content.get("interrupted")
    except (OSError, ValueError, AttributeError):
        return False
