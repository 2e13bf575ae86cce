"""``trimtab bench editing``: ways of editing pictures, and what FlowOpt's inversion takes."""

import argparse
from pathlib import Path
from typing import Any

from trimtab.commands.errors import UsageError
from trimtab.commands.model import add_model_arguments, check_model, load_pipeline
from trimtab.commands.pictures import check_folder

__all__ = ["PARTS", "add_arguments", "add_parser", "run"]

PARTS = ("edits", "residuals", "psnr", "time", "memory")

_DESCRIPTION = """\
Edits pictures whose right result is known by every method at equal evaluations of the network (edits), and inverts
the same pictures: FlowOpt's residual against its passes (residuals), its reconstruction against the autoencoder's
(psnr), its time against the bare network's (time) and its memory against sampling's (memory).
Writes editing.json, flowopt.json and (with matplotlib) edit_fronts.png.

The part edits takes hours on two CPU cores with the 64 edits of the README; it is kept cell by cell: an interrupted
run, called again, goes on where it was.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the benchmark's arguments."""
    parser = subparsers.add_parser(
        "editing",
        help="ways of editing pictures, and FlowOpt's inversion",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser, output="out")


def add_arguments(parser: argparse.ArgumentParser, output: str, parts: tuple[str, ...] = PARTS) -> None:
    """Adds the options, with these defaults of ``--output`` and ``--parts``."""
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(parts), help=f"default: {' '.join(parts)}")
    add("--num-pictures", type=int, default=64, metavar="N", help="edits, and pictures to invert (default: 64)")
    add("--methods", nargs="+", metavar="NAME", help="only these methods of editing (default: all)")
    add("--budget", type=int, default=45, metavar="N", help="evaluations of the network an edit (default: 45)")
    add("--guidance-scale", type=float, default=5.0, metavar="W", help="of the target prompt (default: 5)")
    add("--batch-size", type=int, default=16, metavar="N", help="pictures at once (default: 16)")
    add_model_arguments(parser)
    add("--output", default=output, metavar="FOLDER", help=f"made if missing (default: {Path(output).name})")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measures, prints a line for each cell, and writes the files.

    Raises:
        UsageError: an argument cannot be used; nothing was written then.
    """
    for name in ("num_pictures", "budget", "batch_size"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} takes a whole number, 1 or more; got {getattr(args, name)}")
    folder, model = check_folder(args.output), check_model(args.model)

    from trimtab.benchmarks import editing, flowopt
    from trimtab.benchmarks.editing_cells import METHODS

    methods = args.methods or list(METHODS)
    if unknown := [name for name in methods if name not in METHODS]:
        raise UsageError(f"--methods takes {', '.join(METHODS)}; got {unknown[0]}")
    pipe = load_pipeline(model, args.dtype, args.device)
    pipe.set_progress_bar_config(disable=True)
    parts = list(args.parts)
    if "edits" in parts:
        report = editing.run(
            pipe, model, num_edits=args.num_pictures, methods=methods, budget=args.budget,
            guidance_scale=args.guidance_scale, path=folder / "editing.json", batch_size=args.batch_size,
        )  # fmt: skip
        editing.show(report)
        try:
            from trimtab.benchmarks.editing_plot import plot

            plot(report, folder / "edit_fronts.png")
        except ImportError:
            print("no plot: matplotlib is not installed (pip install matplotlib)")
        parts.remove("edits")
    if parts:
        flowopt.run(pipe, parts, num_pictures=args.num_pictures, path=folder / "flowopt.json")
