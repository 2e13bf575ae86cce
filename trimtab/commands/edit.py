"""``trimtab edit``: a picture in, the edits of it out."""

import argparse
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.commands.edit_jobs import KEYS, edit_jobs
from trimtab.commands.errors import UsageError, first_line
from trimtab.commands.job_runner import Outcome, run_jobs
from trimtab.commands.jobs import Job, add_input_argument
from trimtab.commands.model import add_model_arguments, check_model, load_pipeline
from trimtab.commands.pictures import check_folder, save_png, write_json
from trimtab.commands.words import report_unknown_words

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["add_parser", "as_picture", "run", "sequence_length", "strip"]


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "edit",
        help="edits pictures, without training",
        description="Edits a picture: writes a strip of all iterates, from the freest edit to the closest to the "
        "picture, the one that was picked, a JSON of residuals and evaluations, and a line into manifest.jsonl. Edits "
        "that it has are left alone, so an interrupted run goes on where it was; `accelerate launch -m trimtab edit "
        "...` shares them among processes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="the picture's file")
    add("--source-prompt", metavar="TEXT", help="what the picture shows")
    add("--prompt", metavar="TEXT", help="what it is to show")
    add_input_argument(parser, KEYS)
    add("--negative-prompt", metavar="TEXT", help="what to guide away from")
    add("--mask", metavar="FILE", help="white where the picture may change; the rest is kept pixel by pixel")
    add(
        "--blend",
        metavar="NAME",
        help="how the edit is set into the picture under --mask: feather (default), poisson (by its gradients: no edge "
        "shows), poisson-mixed (the picture's texture comes through) or none",
    )
    add("--strength", type=float, default=0.8, metavar="S", help="how much may change, in (0, 1] (default: 0.8)")
    add("--guidance-scale", type=float, default=3.5, metavar="W", help="of the prompt (default: 3.5)")
    add("--steps", type=int, default=15, metavar="N", help="steps of the full schedule (default: 15)")
    add("--iterations", type=int, default=8, metavar="K", help="the more, the closer to the picture (default: 8)")
    add("--step-size", type=float, metavar="ETA", help="default: estimated from the convergence theorem's bound")
    add("--acceleration", default="none", metavar="NAME", help="none, anderson or inverse (default: none)")
    add(
        "--locality",
        type=float,
        metavar="S",
        help="keep what hardly differs from the picture, relative to its latents' deviation; 0.3 is a good value "
        "(default: the paper's method, without)",
    )
    add("--pick", type=int, metavar="K", help="the iterate that is the result (default: the last)")
    add(
        "--height",
        type=int,
        metavar="PIXELS",
        help="with --width; default: the picture's proportions, the model's area",
    )
    add("--width", type=int, metavar="PIXELS", help="with --height")
    add(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="edits at once; those whose step size is estimated are made alone (default: 1)",
    )
    add_model_arguments(parser)
    add("--output", default="out", metavar="FOLDER", help="made if missing (default: out)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Makes the edits.

    Raises:
        UsageError: if an argument cannot be used; nothing was written then.
        FailedJobs: if some of the lines of ``--input`` failed.
    """
    if args.batch_size < 1:
        raise UsageError(f"--batch-size takes a whole number, 1 or more; got {args.batch_size}")
    jobs = edit_jobs(args, _Edit.endings)
    folder = check_folder(args.output)
    options = {"batch_size": args.batch_size, "device": args.device, "keep_going": args.input is not None}
    run_jobs(_Edit(args, jobs, check_model(args.model)), folder, **options)


class _Edit:
    noun, endings = "edits", (".png", "-strip.png", ".json")

    def __init__(self, args: argparse.Namespace, jobs: list[Job], model: str) -> None:
        self._args, self._jobs, self._model = args, jobs, model
        self._edit: Any = None

    def jobs(self, folder: Path) -> list[Job]:
        return self._jobs

    def load(self, jobs: Sequence[Job], device: str, *, first: bool) -> None:
        from trimtab.pipelines import FlowOptPipeline

        pipe = load_pipeline(self._model, self._args.dtype, device)
        try:
            self._edit = FlowOptPipeline.from_pipe(pipe)
        except ValueError as error:
            raise UsageError(f"--model: {first_line(error)}") from None
        if first:
            texts = [job.settings[key] for job in jobs for key in ("source_prompt", "prompt")]
            report_unknown_words(pipe, list(dict.fromkeys(texts)))
        shown = None if first else True
        self._edit.set_progress_bar_config(desc="iterates", leave=False, position=1, disable=shown)

    def group(self, job: Job) -> Hashable:
        """An estimated step depends on its neighbours; pictures of one batch have one size."""
        settings = job.settings
        if self._args.batch_size == 1 or (settings["step_size"] is None and settings["acceleration"] != "inverse"):
            return None
        alike = [value for key, value in settings.items() if key not in ("image", "prompt", "source_prompt", "mask")]
        return (*alike, settings["mask"] is None, _proportions(settings["image"]))

    def make(self, batch: Sequence[Job]) -> list[Callable[[Path], Outcome]]:
        start = time.perf_counter()
        result = _call(self._edit, [job.settings for job in batch])
        pictures = [state.images for state in result.history]
        if not all(bool(images.isfinite().all()) for images in pictures):
            raise FloatingPointError("an edit is not finite: lower --guidance-scale or take --dtype float32")
        seconds = round((time.perf_counter() - start) / len(batch), 3)
        return [
            partial(_write, job, [as_picture(images[row]) for images in pictures], _figures(result, row), seconds)
            for row, job in enumerate(batch)
        ]


def _call(edit: Any, jobs: Sequence[Mapping[str, Any]]) -> Any:
    """The pipeline's result of edits that are alike but for pictures and prompts."""
    import torch

    common, every = jobs[0], {key: [job[key] for job in jobs] for key in ("image", "prompt", "source_prompt", "mask")}
    try:
        return edit(
            image=every["image"],
            prompt=every["prompt"],
            source_prompt=every["source_prompt"],
            negative_prompt=common["negative_prompt"],
            mask_image=None if common["mask"] is None else every["mask"],
            blend=common["blend"],
            strength=common["strength"],
            guidance_scale=common["guidance_scale"],
            num_inference_steps=common["steps"],
            num_optimization_steps=common["iterations"],
            step_size=common["step_size"],
            acceleration=common["acceleration"],
            locality=common["locality"],
            height=common["height"],
            width=common["width"],
            keep_history=True,
            output_type="latent",
            **sequence_length(edit),
        )
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{len(jobs)} pictures are too large for the device: {first_line(error)}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{common['image']}: {first_line(error)}") from error
    except RuntimeError as error:
        if "not finite" not in str(error):
            raise
        reason = first_line(error)
        raise FloatingPointError(f"{reason}: lower --guidance-scale or take --dtype float32") from error


def _figures(result: Any, row: int) -> dict[str, Any]:
    return {
        "residuals": [float(value) for value in result.residuals[:, row]],
        "evaluations": [state.num_function_evaluations for state in result.history],
        "step_size": float(result.step_size[row]),
    }


def _write(job: Job, pictures: "Sequence[Image]", figures: Mapping[str, Any], seconds: float, folder: Path) -> Outcome:
    """Writes an edit's three files, the JSON last."""
    from trimtab.pipelines.images import fit_images, load_image

    settings = dict(job.settings)
    picked = len(pictures) - 1 if settings["pick"] is None else min(settings["pick"], len(pictures) - 1)
    source = as_picture(fit_images([load_image(settings["image"])], pictures[0].size)[0])
    labels = ["source", *(f"{k}: residual {value:.3g}" for k, value in enumerate(figures["residuals"]))]
    paths = [folder / f"{job.name}{ending}" for ending in _Edit.endings]
    made_by = {"prompt": settings["prompt"], "settings": settings}
    save_png(pictures[picked], paths[0], made_by)
    save_png(strip([source, *pictures], labels, marked=picked + 1), paths[1], made_by)
    files = [path.name for path in paths]
    report = {"job": settings, "picked": picked, **figures, "size": list(pictures[0].size), "files": files[:2]}
    write_json(paths[2], report)
    last = {
        "picked": picked,
        "residual": figures["residuals"][picked],
        "evaluations": figures["evaluations"][-1],
        "step_size": figures["step_size"],
        "seconds": seconds,
    }
    return Outcome(files, last, [str(path) for path in paths])


def _proportions(image: str) -> float | None:
    """Width by height, as a picture's file says, upright; None where it can't be read, which its turn tells."""
    from PIL import Image

    try:
        with Image.open(image) as opened:
            width, height = opened.size
            turned = opened.getexif().get(0x0112, 1) >= 5
    except Exception:  # broken files raise nearly anything
        return None
    return height / width if turned else width / height


def strip(pictures: "Sequence[Image]", labels: Sequence[str], *, marked: int | None = None) -> "Image":
    """Pictures side by side, each under its label, one of them framed.

    Args:
        pictures: of one size.
        labels: one a picture.
        marked: number of the framed one.
    """
    from PIL import Image, ImageDraw, ImageFont

    width, height = pictures[0].size
    font = ImageFont.load_default(size=12)
    gap, line = 8, 18
    cell = max(width, *(math.ceil(font.getlength(label)) for label in labels))
    sheet = Image.new("RGB", (len(pictures) * (cell + gap) + gap, height + line + 2 * gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left, top = gap + index * (cell + gap), gap + line
        draw.text((left, gap), label, fill="black", font=font)
        sheet.paste(picture, (left, top))
        if index == marked:
            draw.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), outline="black", width=2)
    return sheet


def as_picture(image: Any) -> "Image":
    """A tensor (3, H, W) in [0, 1] as a picture."""
    from trimtab.pipelines.flowopt_output import as_output_type

    return as_output_type(image[None], "pil")[0]


def sequence_length(pipe: Any) -> dict[str, int]:
    """The longest caption of a model with a vocabulary of words; more is padding."""
    from trimtab.pipelines.stock_call import stock_arguments
    from trimtab.pipelines.vocabulary import word_level_tokenizers

    short = word_level_tokenizers(pipe) and "max_sequence_length" in stock_arguments(pipe)
    return {"max_sequence_length": 16} if short else {}
