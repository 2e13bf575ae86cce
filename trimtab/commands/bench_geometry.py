"""``trimtab bench geometry``: speed, memory and results of the point-cloud distances."""

import argparse
from pathlib import Path
from typing import Any

from trimtab.commands.errors import UsageError
from trimtab.commands.pictures import check_folder

__all__ = ["PARTS", "add_arguments", "add_parser", "run"]

PARTS = ("speed", "memory", "scaling", "chamfer", "flow", "losses")


def add_parser(subparsers: Any) -> None:
    """Adds the benchmark's arguments."""
    parser = subparsers.add_parser(
        "geometry",
        help="sliced Wasserstein and chamfer distances against other ways",
        description="Times the point-cloud distances against POT, torch.sort and a dense chamfer distance in one run, "
        "and moves a sphere's points to a bunny under each loss. Prints tables; writes geometry.json and pictures. "
        "--parts losses trains autoencoders under each loss of the paper's table, about 15 minutes on two cores.",
        allow_abbrev=False,
    )
    add_arguments(parser, output="out")


def add_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Adds the options, with this default of ``--output``."""
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS[:-1]), help="default: all but losses")
    add("--output", default=output, metavar="FOLDER", help=f"made if missing (default: {Path(output).name})")
    add("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measures, prints and writes.

    Raises:
        UsageError: the folder cannot be written, or POT is missing.
    """
    folder = check_folder(args.output)

    from trimtab.benchmarks import geometry

    try:
        geometry.measure(args.parts, folder, quick=args.quick)
    except ImportError as error:
        raise UsageError(f"this benchmark compares with POT: pip install 'trimtab[geometry]' ({error})") from None
