"""``trimtab generate``: prompts in, pictures out."""

import argparse
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.commands.errors import UsageError, first_line
from trimtab.commands.job_runner import Outcome, run_jobs
from trimtab.commands.jobs import KEYS, Job, Key, add_input_argument, check_entry, is_text, read_jobs
from trimtab.commands.json_lines import given_path
from trimtab.commands.model import (
    add_model_arguments,
    check_model,
    load_pipeline,
    stated_size_multiple,
)
from trimtab.commands.pictures import check_folder, save_png, slug
from trimtab.commands.words import report_unknown_words

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["JOB_KEYS", "GenerateCommand", "add_parser", "check_size", "run"]


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "generate",
        help="pictures of prompts, under a guidance rule",
        description="Writes pictures of prompts as PNG files, each with its prompt, seed and settings in it, "
        "and a line a picture into manifest.jsonl. Picture i of a prompt has seed SEED + i, whatever is "
        "made beside it. Pictures that the manifest has are left alone, so an interrupted run goes on where it was; "
        "`accelerate launch -m trimtab generate ...` shares the pictures among processes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to show")
    add("--prompt-file", metavar="FILE", help="a text file with a prompt a line, besides those given")
    add_input_argument(parser, JOB_KEYS)
    add("--negative-prompt", metavar="TEXT", help="what to guide away from")
    add(
        "--guidance",
        default="apg",
        metavar="NAME",
        help="cfg (the pipeline's own), apg, another that `trimtab info` lists, or a .json file that `trimtab tune` "
        "wrote (default: apg)",
    )
    add(
        "--guidance-scale",
        type=_scale,
        metavar="W",
        help="0 or more (default: the rule's own, such as 10 for apg, 7.5 for cfg, 0.6 for cfg++)",
    )
    add("--num-images", type=_positive, default=1, metavar="N", help="pictures a prompt (default: 1)")
    add("--seed", type=_seed, default=0, metavar="SEED", help="of a prompt's first picture (default: 0)")
    add("--steps", type=_positive, default=20, metavar="N", help="steps of the scheduler (default: 20)")
    add("--height", type=_positive, metavar="PIXELS", help="default: the model's")
    add("--width", type=_positive, metavar="PIXELS", help="default: the model's")
    add("--batch-size", type=_positive, default=4, metavar="N", help="pictures at once (default: 4)")
    add_model_arguments(parser)
    add("--output", default="out", metavar="FOLDER", help="made if missing (default: out)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Makes the pictures.

    Raises:
        UsageError: if an argument cannot be used; nothing was written then.
        FailedJobs: if some of the lines of ``--input`` failed.
    """
    if args.input is not None and (args.prompts or args.prompt_file):
        raise UsageError("--input has the prompts; leave PROMPT and --prompt-file away")
    prompts = _prompts(args.prompts, args.prompt_file) if args.input is None else []
    folder = check_folder(args.output)
    options = {"batch_size": args.batch_size, "device": args.device, "keep_going": args.input is not None}
    run_jobs(GenerateCommand(args, prompts, check_model(args.model)), folder, **options)


class GenerateCommand:
    """The command, for :func:`trimtab.commands.job_runner.run_jobs`."""

    noun, endings = "pictures", (".png",)

    def __init__(self, args: argparse.Namespace, prompts: Sequence[str], model: str) -> None:
        self._args, self._prompts, self._model = args, prompts, model
        self._multiple = stated_size_multiple(model)
        self._pipe: Any = None

    def jobs(self, folder: Path) -> list[Job]:
        if self._args.input is not None:
            return read_jobs(self._args.input, self._settings, _name, self.endings)
        lines = enumerate({"prompt": prompt} for prompt in self._prompts)
        return [Job(_name(i, one), one) for i, line in lines for one in self._settings(line, "", Path())]

    def _settings(self, line: Any, where: str, beside: Path) -> Iterator[dict[str, Any]]:
        """The settings of a line's pictures: what it says, over what the flags say."""
        check_entry(line, JOB_KEYS, where, required=["prompt"], nullable=["negative_prompt", "height", "width"])
        given = {"model": self._args.model or "bundled", "dtype": self._args.dtype}
        given |= {key: line.get(key, getattr(self._args, key, None)) for key in JOB_KEYS}
        check_size(given, self._multiple, where)
        if not is_text(given["negative_prompt"] or ""):
            raise UsageError("--negative-prompt takes a text in UTF-8")

        from trimtab.commands.sampling import check_guidance

        if where and str(line.get("guidance", "")).endswith(".json"):
            given["guidance"] = str(beside / given_path(line["guidance"], f'{where}"guidance"'))
        # A scale on the command line is for the rule there.
        scale = line.get("guidance_scale", None if "guidance" in line else self._args.guidance_scale)
        try:
            given["guidance_scale"] = check_guidance(given["guidance"], scale)
        except UsageError as error:
            raise UsageError(f"{where}{error}") from None
        for image in range(self._args.num_images):
            yield {**given, "seed": given["seed"] + image}

    def load(self, jobs: Sequence[Job], device: str, *, first: bool) -> None:
        self._pipe = pipe = load_pipeline(self._model, self._args.dtype, device)
        pipe.set_progress_bar_config(desc="steps", leave=False, position=1, disable=None if first else True)
        if first:
            texts = [job.settings[key] or "" for key in ("prompt", "negative_prompt") for job in jobs]
            report_unknown_words(pipe, list(dict.fromkeys(texts)))

    def group(self, job: Job) -> Hashable:
        return tuple(value for key, value in job.settings.items() if key not in ("prompt", "seed"))

    def make(self, batch: Sequence[Job]) -> list[Callable[[Path], Outcome]]:
        from trimtab.commands.sampling import sample
        from trimtab.pipelines.families import size_multiple

        common, start = batch[0].settings, time.perf_counter()
        check_size(common, size_multiple(self._pipe))
        images = sample(
            self._pipe,
            [job.settings["prompt"] for job in batch],
            [job.settings["seed"] for job in batch],
            **{key: common[key] for key in _OF_THE_CALL},
        )
        seconds = (time.perf_counter() - start) / len(batch)
        return [partial(self._write, job, image, seconds) for job, image in zip(batch, images, strict=True)]

    def _write(self, job: Job, image: "Image", seconds: float, folder: Path) -> Outcome:
        path = folder / f"{job.name}.png"
        pipe, size = self._pipe, {"width": image.width, "height": image.height}
        dtype = str(pipe.dtype).removeprefix("torch.")
        made = {"pipeline": type(pipe).__name__, **size, "dtype": dtype, "device": pipe.device.type}
        settings = {key: value for key, value in job.settings.items() if key not in ("prompt", "seed")} | made
        save_png(image, path, {"prompt": job.settings["prompt"], "seed": job.settings["seed"], "settings": settings})
        return Outcome([path.name], {**size, "seconds": round(seconds, 3)}, [str(path)])


JOB_KEYS = {**KEYS, "guidance": Key(str)}
_OF_THE_CALL = ("guidance", "guidance_scale", "steps", "height", "width", "negative_prompt")


def _name(index: int, settings: Mapping[str, Any]) -> str:
    guidance = settings["guidance"]
    rule = slug(Path(guidance).stem, 24) if guidance.endswith(".json") else guidance
    seed = settings["seed"]
    return f"{index:04d}-{slug(settings['prompt'])}-{rule}-{settings['guidance_scale']:g}-seed{seed}"


def _prompts(given: list[str], file: str | None) -> list[str]:
    prompts = list(given)
    if blank := [str(number) for number, prompt in enumerate(prompts, start=1) if not prompt.strip()]:
        raise UsageError(f"a PROMPT must have a word in it; prompt {', '.join(blank)} is blank")
    if file is not None:
        try:
            lines = given_path(file, "--prompt-file").read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UsageError(f"--prompt-file takes a text file; {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UsageError(f"--prompt-file takes UTF-8 text; {file}: {first_line(error)}") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        where = f"; {file} has no line with a word in it" if file else ""
        raise UsageError(f"give at least one PROMPT or a --prompt-file{where}")
    return prompts


def check_size(settings: Mapping[str, Any], multiple: int, where: str = "") -> None:
    """Makes sure that a picture's sides are multiples of what the model takes.

    Args:
        settings: with ``height`` and ``width`` in pixels, or None.
        multiple: in pixels.
        where: the start of a message, where a line of a file says so.

    Raises:
        UsageError: if not.
    """
    for name in ("height", "width"):
        pixels = settings[name]
        if pixels and pixels % multiple:
            near, named = (
                max(multiple, round(pixels / multiple) * multiple),
                f'{where}"{name}"' if where else f"--{name}",
            )
            raise UsageError(f"{named} takes a multiple of {multiple} for this model ({near}, say); got {pixels}")


def _scale(text: str) -> float:
    value = _number(text, float, "a number, 0 or more")
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"takes a finite number, 0 or more; got {text}")
    return value


def _positive(text: str) -> int:
    value = _number(text, int, "a whole number, 1 or more")
    if value < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number, 1 or more; got {text}")
    return value


def _seed(text: str) -> int:
    value = _number(text, int, "a whole number, 0 or more")
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"takes a whole number from 0 to 2**63 - 1; got {text}")
    return value


def _number(text: str, kind: Any, takes: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes {takes}; got {text!r}") from None
