"""``trimtab edit``: a picture in, the edits of it out."""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.commands.edit_jobs import OPTIONAL, edit_jobs
from trimtab.commands.errors import UsageError, first_line
from trimtab.commands.model import add_model_arguments, check_model, load_pipeline
from trimtab.commands.pictures import check_folder, save_png, write_json
from trimtab.commands.words import report_unknown_words

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["add_parser", "as_picture", "edit_one", "run", "sequence_length", "strip"]


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "edit",
        help="edits pictures, without training",
        description="Edits a picture: writes a strip of all iterates, from the freest edit to the closest to the "
        "picture, the one that was picked, and a JSON of residuals and evaluations. A JSONL file has many edits, one "
        "a line; those whose JSON is in the folder already are left alone, so an interrupted run goes on where it was.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="the picture's file")
    add("--source-prompt", metavar="TEXT", help="what the picture shows")
    add("--prompt", metavar="TEXT", help="what it is to show")
    add(
        "--jobs",
        metavar="FILE",
        help="a JSONL file in place of IMAGE and the prompts: image, source_prompt and prompt a line, and any of "
        f"{', '.join(OPTIONAL)}; paths from the file's folder",
    )
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
    add_model_arguments(parser)
    add("--output", default="out", metavar="FOLDER", help="made if missing (default: out)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Makes the edits.

    Raises:
        UsageError: if an argument cannot be used; nothing was written then, or only the edits before the one at fault.
    """
    jobs = edit_jobs(args)
    folder = check_folder(args.output)
    model = check_model(args.model)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    mine = [(name, job) for index, (name, job) in enumerate(jobs) if index % world == rank]
    todo = [(name, job) for name, job in mine if not _is_done(folder / f"{name}.json", job)]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} edits are in {folder} already", file=sys.stderr)
    if not todo:
        return

    from tqdm import tqdm

    from trimtab.pipelines import FlowOptPipeline

    pipe = load_pipeline(model, args.dtype, _device(args.device))
    try:
        edit = FlowOptPipeline.from_pipe(pipe)
    except ValueError as error:
        raise UsageError(f"--model: {first_line(error)}") from None
    report_unknown_words(pipe, [job[key] for _, job in todo for key in ("source_prompt", "prompt")])
    edit.set_progress_bar_config(desc="iterates", leave=False, position=1, disable=None)
    for name, job in tqdm(todo, desc="edits", unit="edit", disable=None if len(todo) > 1 else True):
        for path in edit_one(edit, job, folder, name, {"model": args.model or "bundled"}):
            tqdm.write(str(path), file=sys.stdout)


def edit_one(edit: Any, job: Mapping[str, Any], folder: Path, name: str, made_by: Mapping[str, Any]) -> list[Path]:
    """Makes one edit and writes its three files, the JSON last.

    Args:
        edit: a FlowOpt pipeline.
        job: an edit's settings, complete.
        folder: where to, made if missing.
        name: of the files, before their endings.
        made_by: what else the JSON is to say.

    Returns:
        The files.

    Raises:
        UsageError: if the pipeline refuses the edit.
    """
    import torch

    start = time.perf_counter()
    try:
        result = edit(
            image=job["image"],
            prompt=job["prompt"],
            source_prompt=job["source_prompt"],
            negative_prompt=job["negative_prompt"],
            mask_image=job["mask"],
            blend=job["blend"],
            strength=job["strength"],
            guidance_scale=job["guidance_scale"],
            num_inference_steps=job["steps"],
            num_optimization_steps=job["iterations"],
            step_size=job["step_size"],
            acceleration=job["acceleration"],
            locality=job["locality"],
            height=job["height"],
            width=job["width"],
            keep_history=True,
            output_type="latent",
            **sequence_length(edit),
        )
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"the picture is too large for the device: {first_line(error)}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{job['image']}: {first_line(error)}") from error
    pictures = [as_picture(state.images[0]) for state in result.history]
    picked = len(pictures) - 1 if job["pick"] is None else min(job["pick"], len(pictures) - 1)
    residuals = [float(value) for value in result.residuals[:, 0]]
    from trimtab.pipelines.images import fit_images, load_image

    source = as_picture(fit_images([load_image(job["image"])], pictures[0].size)[0])
    labels = ["source", *(f"{k}: residual {value:.3g}" for k, value in enumerate(residuals))]
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}{ending}" for ending in (".png", "-strip.png", ".json")]
    settings = {"prompt": job["prompt"], "settings": {**made_by, **job}}
    save_png(pictures[picked], paths[0], settings)
    save_png(strip([source, *pictures], labels, marked=picked + 1), paths[1], settings)
    write_json(
        paths[2],
        {
            **made_by,
            "job": dict(job),
            "picked": picked,
            "residuals": residuals,
            "evaluations": [state.num_function_evaluations for state in result.history],
            "step_size": float(result.step_size[0]),
            "size": list(pictures[0].size),
            "seconds": round(time.perf_counter() - start, 3),
            "files": [path.name for path in paths[:2]],
        },
    )
    return paths


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


def _device(device: str) -> str:
    """Under ``accelerate launch`` each process takes the accelerator of its number."""
    if device != "auto" or "LOCAL_RANK" not in os.environ:
        return device
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return f"{found.type}:{os.environ['LOCAL_RANK']}" if found else device


def _is_done(path: Path, job: Mapping[str, Any]) -> bool:
    """Whether the JSON of just this edit is there: it is written last."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("job") == job
    except (OSError, ValueError, AttributeError):
        return False
