"""``trimtab demo``: prompts under CFG and APG at growing scales, an edit, an optimized picture, a point cloud."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.commands.demo_edit import demo_edit
from trimtab.commands.demo_optimize import demo_optimize
from trimtab.commands.demo_reconstruct import demo_reconstruct
from trimtab.commands.model import add_model_arguments, check_model, load_pipeline
from trimtab.commands.pictures import check_folder, save_png

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["add_parser", "run"]

PROMPTS = (
    "a cat to the left of an owl on a sky background",
    "three strawberries on a mint background",
    "a panda on a lavender background",
)
RULES = ("cfg", "apg")
SCALES = (3.0, 7.0, 15.0)


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "demo",
        help="the bundled model under CFG and APG, side by side",
        description="Writes demo.png, the same prompts and seeds under CFG and APG at scales 3, 7 and 15; edit.png, "
        "a drawn picture and the iterates of its edit; optimize.png, a picture whose noise climbs a reward; and "
        "chair-reconstruction.gif, a point cloud and its reconstruction, turning. Prints each column's saturation "
        "(mean of the HSV S channel) and contrast (deviation of luminance).",
        allow_abbrev=False,
    )
    parser.add_argument("--output", default="out", metavar="FOLDER", help="made if missing (default: out)")
    parser.add_argument("--seed", type=int, default=0, help="of the first row's pictures (default: 0)")
    parser.add_argument("--steps", type=int, default=20, help="steps of the scheduler (default: 20)")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Makes the picture and prints where everything is.

    Raises:
        UsageError: if an argument cannot be used; nothing was written then.
    """
    folder = check_folder(args.output)
    model = check_model(args.model)

    import numpy as np
    import torch
    from tqdm import tqdm

    from trimtab.commands.sampling import sample
    from trimtab.guidance.statistics import contrast, saturation

    start = time.perf_counter()
    pipe = load_pipeline(model, args.dtype, args.device)
    pipe.set_progress_bar_config(disable=True)
    columns: dict[tuple[str, float], list[Image]] = {}
    labels = []
    print(f"{'rule':<6}{'scale':>6}{'saturation':>12}{'contrast':>10}")
    for rule, scale in tqdm([(rule, scale) for rule in RULES for scale in SCALES], desc="demo", disable=None):
        seeds = [args.seed + row for row in range(len(PROMPTS))]
        images = sample(pipe, PROMPTS, seeds, guidance=rule, guidance_scale=scale, steps=args.steps)
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).movedim(-1, 1) / 255
        figures = saturation(pixels).mean().item(), contrast(pixels).mean().item()
        columns[rule, scale] = images
        labels.append(f"{rule.upper()} {scale:g}\nsaturation {figures[0]:.3f}")
        tqdm.write(f"{rule:<6}{scale:>6g}{figures[0]:>12.3f}{figures[1]:>10.3f}", file=sys.stdout)

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "demo.png"
    made_by = {"prompts": PROMPTS, "seed": args.seed, "model": args.model or "bundled"}
    save_png(_sheet(list(columns.values()), labels), path, made_by)
    edited = demo_edit(pipe, folder)
    optimized = demo_optimize(pipe, folder, bundled=args.model is None)
    turned = demo_reconstruct(folder)
    print(f"\npicture  {path.resolve()}\nedit     {edited.resolve()}\noptimize {optimized.resolve()}")
    print(f"cloud    {turned.resolve()}")
    print(f"model    {model}")
    print(f"code     {Path(__file__).parents[2]}")
    print(f"took     {time.perf_counter() - start:.0f} s\nnext     trimtab generate --help")


def _sheet(columns: "list[list[Image]]", labels: list[str]) -> "Image":
    """The pictures in a grid: a column a rule and scale under its label, a row a prompt under its text."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = columns[0][0].size
    gap, head, line = 8, 36, 18
    wide = len(columns) * (width + gap) + gap
    tall = head + len(PROMPTS) * (height + line + gap)
    sheet = Image.new("RGB", (wide, tall), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for column, (images, label) in enumerate(zip(columns, labels, strict=True)):
        left = gap + column * (width + gap)
        draw.multiline_text((left, 4), label, fill="black", font=font)
        for row, image in enumerate(images):
            top = head + row * (height + line + gap)
            sheet.paste(image, (left, top + line))
            if column == 0:
                draw.text((left, top + 2), PROMPTS[row], fill="black", font=font)
    return sheet
