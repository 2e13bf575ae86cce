"""``trimtab optimize``: prompts in, pictures out whose noise was moved until rewards like them."""

import argparse
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.commands.edit import sequence_length
from trimtab.commands.errors import UsageError, first_line
from trimtab.commands.few_steps import FEW_STEPS_CALL, with_few_steps
from trimtab.commands.generate import _positive, _scale, _seed, check_size
from trimtab.commands.job_runner import Outcome, run_jobs
from trimtab.commands.jobs import Job, add_input_argument
from trimtab.commands.model import add_model_arguments, check_model, load_pipeline, stated_size_multiple
from trimtab.commands.optimize_curvature import curvatures
from trimtab.commands.optimize_jobs import JOB_KEYS, OF_THE_RUN, optimize_jobs, reward_weights
from trimtab.commands.optimize_report import write_optimized
from trimtab.commands.pictures import check_folder
from trimtab.commands.words import report_unknown_words

__all__ = ["add_parser", "optimize", "run"]

GUIDED_CALL = {"num_inference_steps": 8, "guidance_scale": 5.0}
"""Of the bundled model where a flag asks for steps or guidance: its own transformer is blurred at fewer steps."""


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "optimize",
        help="pictures whose noise is optimized against rewards",
        description="Moves the noise of a frozen model until rewards like the picture. Writes the best picture, a "
        "strip of the improvements, the curve of the reward, a JSON of all figures, and a line into manifest.jsonl. "
        "Pictures that it has are left alone, so an interrupted run goes on where it was; `accelerate launch -m "
        "trimtab optimize ...` shares them among processes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to show")
    add_input_argument(parser, JOB_KEYS)
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
        FailedJobs: if some of the lines of ``--input`` failed.
        KeyboardInterrupt: when interrupted, after the best pictures so far were written.
    """
    if args.learning_rate is not None and not 0 < args.learning_rate < float("inf"):
        raise UsageError(f"--learning-rate takes a number above 0; got {args.learning_rate:g}")
    weights = reward_weights(args.reward or ["bundled"])
    if args.weighting == "worst-case" and (isinstance(weights, str) or sum(map(bool, weights.values())) < 2):
        raise UsageError("--weighting worst-case takes two or more --reward NAME[=WEIGHT] whose weights are not 0")
    if args.input is None and not args.prompts:
        raise UsageError("give at least one PROMPT or a file of them with --input")
    folder = check_folder(args.output)
    options = {"batch_size": args.batch_size, "device": args.device, "keep_going": args.input is not None}
    run_jobs(_Optimize(args, weights, check_model(args.model)), folder, **options)


class _Optimize:
    noun, endings = "pictures", (".png", "-strip.png", "-rewards.png", "-curvature.png", ".json")

    def __init__(self, args: argparse.Namespace, weights: str | dict[str, float], model: str) -> None:
        self._args, self._weights, self._model = args, weights, model
        self._pipes: dict[bool, Any] = {}
        self._stock: Any = None
        self._reward: Any = None
        self._monitor: Any = None
        self._shown: bool | None = None

    def jobs(self, folder: Path) -> list[Job]:
        args = self._args
        common = {"model": args.model or "bundled", "dtype": args.dtype, "reward": self._weights}
        common |= {
            "weighting": args.weighting,
            "monitor": args.monitor,
            **({"curvature": True} if args.curvature else {}),
        }
        return optimize_jobs(args, common, stated_size_multiple(self._model), self.endings)

    def load(self, jobs: Sequence[Job], device: str, *, first: bool) -> None:
        from trimtab.pipelines.families import size_multiple

        self._stock = load_pipeline(self._model, self._args.dtype, device)
        if self._args.input is None:
            check_size(jobs[0].settings, size_multiple(self._stock))
        on = self._stock.device
        self._reward = _reward(self._weights, on, weighting=self._args.weighting)
        self._monitor = None if self._args.monitor is None else _reward(self._args.monitor, on, "--monitor")
        if first:
            texts = [job.settings[key] or "" for key in ("prompt", "negative_prompt") for job in jobs]
            report_unknown_words(self._stock, list(dict.fromkeys(texts)))
        self._shown = None if first else True

    def _pipe(self, few_steps: bool) -> Any:
        from trimtab.pipelines import NoiseOptimizationPipeline

        if few_steps not in self._pipes:
            stock = with_few_steps(self._stock) if few_steps else self._stock
            self._pipes[few_steps] = NoiseOptimizationPipeline.from_pipe(stock, reward=self._reward)
            self._pipes[few_steps].set_progress_bar_config(desc="iterations", leave=False, disable=self._shown)
        return self._pipes[few_steps]

    def group(self, job: Job) -> Hashable:
        texts = ("prompt", "negative_prompt", "reward_prompt", "seed", "reward")  # the reward is that of the command
        alike = [value for key, value in job.settings.items() if key not in texts]
        return (*alike, job.settings["negative_prompt"] is None)

    def make(self, batch: Sequence[Job]) -> list[Callable[[Path], Outcome]]:
        from trimtab.pipelines.families import size_multiple

        check_size(batch[0].settings, size_multiple(self._stock))
        pipe = self._pipe(_few_steps(batch[0].settings))
        return optimize(pipe, [job.settings for job in batch], [job.name for job in batch], monitor=self._monitor)


def optimize(
    pipe: Any, jobs: Sequence[Mapping[str, Any]], names: Sequence[str], *, monitor: Any = None
) -> list[Callable[[Path], Outcome]]:
    """Makes the pictures of one batch.

    Args:
        pipe: a noise-optimizing pipeline with a reward.
        jobs: settings, alike but for prompt, seed and texts.
        names: of their files.
        monitor: a held-out reward.

    Returns:
        For each picture what writes its files into a folder, its JSON last.

    Raises:
        UsageError: if the pipeline refuses an argument.
    """
    import torch

    from trimtab.commands.optimize_report import Improvements

    start, improvements = time.perf_counter(), Improvements()
    common = jobs[0]
    texts = {key: [job[key] for job in jobs] for key in ("prompt", "negative_prompt", "reward_prompt")}
    told = [text or prompt for text, prompt in zip(texts["reward_prompt"], texts["prompt"], strict=True)]
    negative = None if texts["negative_prompt"][0] is None else texts["negative_prompt"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what it tells is in the files and in the lines
            result = pipe(
                texts["prompt"],
                negative_prompt=negative,
                reward_prompt=told,
                generator=[torch.Generator("cpu").manual_seed(job["seed"]) for job in jobs],
                monitor=monitor,
                callback_on_iteration_end=improvements,
                output_type="pil",
                **_call(pipe, common),
            )
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{len(jobs)} pictures at once are too many: {first_line(error)}") from error
    except (ValueError, TypeError, FileNotFoundError) as error:  # a preset's file is read by the call
        raise UsageError(first_line(error)) from error
    seconds = round((time.perf_counter() - start) / len(jobs), 3)
    spectra = [None] * len(jobs)
    if common.get("curvature") and not result.interrupted:
        spectra = curvatures(pipe, result.latents, jobs, _call(pipe, common))
    return [
        partial(write_optimized, result, row, job, name, improvements, seconds, spectra[row])
        for row, (name, job) in enumerate(zip(names, jobs, strict=True))
    ]


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
    return {**sequence_length(pipe), **call, **{name: job[name] for name in OF_THE_RUN}}


def _reward(given: Any, device: Any, flag: str = "--reward", weighting: str = "sum") -> Any:
    from trimtab.rewards import WeightedReward, load_reward

    try:
        if isinstance(given, str):
            return load_reward(given, device=device)
        return WeightedReward(given, weighting=weighting, device=device)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(f"{flag}: {first_line(error)}") from error
