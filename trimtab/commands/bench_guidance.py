"""``trimtab bench guidance``: all guidance rules on the bundled model."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from trimtab.commands.errors import UsageError
from trimtab.commands.model import add_model_arguments, check_model, load_pipeline
from trimtab.commands.pictures import check_folder

__all__ = ["add_arguments", "add_parser", "run"]

_DESCRIPTION = """\
Draws pictures of held-out captions under every guidance rule at scales from 1 to 20 and measures how many show
their caption, their saturation and contrast, their Fréchet distance to rendered scenes, and seconds a picture.
Writes guidance.json, guidance.md and (with matplotlib) guidance.png.

The default plan has 55 cells (a rule at a scale): with 64 captions roughly half an hour on two idle CPU cores,
half of it with --dtype bfloat16 on a CPU that computes in it.
Finished cells are kept: an interrupted run, called again, goes on where it was.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the benchmark's arguments."""
    parser = subparsers.add_parser(
        "guidance",
        help="all guidance rules on the bundled model",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser, output="out")


def add_arguments(parser: argparse.ArgumentParser, output: str, name: str = "guidance") -> None:
    """Adds the options, with this default of ``--output`` and this name of the files."""
    add = parser.add_argument
    add("--num-captions", type=int, metavar="N", help="8 or more (default: 64 on a CPU, else 400)")
    add("--steps", type=int, default=20, metavar="N", help="steps of the scheduler (default: 20)")
    add("--seed", type=int, default=2024, metavar="SEED", help="of the first picture (default: 2024)")
    add("--rules", nargs="+", metavar="NAME", help="only these rules (default: all)")
    add(
        "--scales",
        nargs="+",
        type=float,
        metavar="W",
        help="w in place of the plan's; cfg++ and autoguidance keep their own scales",
    )
    add("--batch-size", type=int, default=16, metavar="N", help="pictures at once (default: 16)")
    add_model_arguments(parser)
    add("--output", default=output, metavar="FOLDER", help=f"made if missing (default: {Path(output).name})")
    add("--overwrite", action="store_true", help="replace results of other settings that are there")
    parser.set_defaults(run=run, name=name)


def run(args: argparse.Namespace) -> None:
    """Measures, prints a line for each cell, and writes the files.

    Raises:
        UsageError: if an argument cannot be used; nothing was written then.
    """
    _check(args)
    folder = check_folder(args.output)
    model = check_model(args.model)

    from tqdm import tqdm

    from trimtab.benchmarks import guidance_rules as rules
    from trimtab.benchmarks.scene_figures import Scenes
    from trimtab.commands.sampling import check_guidance

    cells = rules.plan(args.rules, args.scales)
    for rule, scale in cells:
        if rule != rules.NONE:
            check_guidance(rule, scale)
    pipe = load_pipeline(model, args.dtype, args.device)
    pipe.set_progress_bar_config(disable=True)
    count = args.num_captions or (64 if pipe.device.type == "cpu" else 400)
    settings = rules.Settings(
        model=rules.digest(model),
        num_captions=count,
        steps=args.steps,
        seed=args.seed,
        dtype=str(pipe.dtype).removeprefix("torch."),
        device=pipe.device.type,
        num_scenes=Scenes.number(count),
    )
    paths = {kind: folder / f"{args.name}.{kind}" for kind in ("json", "md", "png")}
    print(f"{'rule':<14}{'scale':>6}{'match':>8}{'saturation':>12}{'contrast':>10}{'Fréchet':>9}{'s/picture':>11}")
    with tqdm(total=len(cells) * count, desc="pictures", unit="picture", disable=None) as progress:

        def on_pictures(rule: str, scale: float, done: int) -> None:
            progress.set_postfix_str(f"{rule} {scale:g}", refresh=False)
            progress.update(done)

        report = rules.run(
            pipe,
            settings,
            cells,
            paths["json"],
            batch_size=args.batch_size,
            overwrite=args.overwrite,
            on_pictures=on_pictures,
            on_cell=lambda cell: tqdm.write(_line(cell["rule"], cell), file=sys.stdout),
        )
    print(_line("scenes", report["scenes"]))
    _write_text(paths["md"], rules.table(report))
    try:
        from trimtab.benchmarks.guidance_rules_plot import plot

        temporary = folder / f".{paths['png'].name}"
        plot(report, temporary)
        temporary.replace(paths["png"])
    except ImportError:
        del paths["png"]
        print("no plot: matplotlib is not installed (pip install matplotlib)")
    print(_verdict(report["claims"]))
    print("\n".join(f"{kind:<8}{path.resolve()}" for kind, path in paths.items()))


def _check(args: argparse.Namespace) -> None:
    limits = {"num_captions": 8, "steps": 1, "seed": 0, "batch_size": 1}
    for name, least in limits.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} takes a whole number, {least} or more; got {value}")
    if unusable := [scale for scale in args.scales or () if not 0 <= scale < math.inf]:
        raise UsageError(f"--scales takes finite numbers, 0 or more; got {unusable[0]}")


def _line(rule: str, cell: dict[str, Any]) -> str:
    scale = f"{cell['scale']:g}" if "scale" in cell else ""
    seconds = f"{cell['seconds_per_picture']:.2f}" if "scale" in cell else ""
    return (
        f"{rule:<14}{scale:>6}{cell['match']:>8.0%}{cell['saturation']:>12.3f}{cell['contrast']:>10.3f}"
        f"{1000 * cell['frechet']:>9.0f}{seconds:>11}"
    )


def _verdict(claims: dict[str, Any]) -> str:
    """What the comparison is for, in a line or two."""
    lines = []
    for rule in ("cfg", "apg"):
        if f"{rule}_match_at_15" in claims:
            ratio, low, high = claims[f"{rule}_saturation_over_scenes_at_15"]
            lines.append(
                f"{rule} at w = 15: saturation {ratio:.3f} of the scenes' (95 % from {low:.3f} to {high:.3f}), "
                f"{claims[f'{rule}_match_at_15']:.0%} of captions matched"
            )
    if "cfg_best_match" in claims:
        lines.append(
            f"cfg at its best scale, {claims['cfg_best_scale']:g}: {claims['cfg_best_match']:.0%} of captions matched"
        )
    return "\n".join(lines)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
