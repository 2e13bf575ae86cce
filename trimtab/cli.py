"""The command line: ``trimtab generate``, ``edit``, ``optimize``, ``reconstruct`` and others."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from trimtab import __version__
from trimtab.commands import (
    app,
    bench,
    demo,
    edit,
    export_pipeline,
    generate,
    info,
    optimize,
    protect,
    reconstruct,
    tune,
)
from trimtab.commands.errors import FailedJobs, UsageError, first_line, one_line

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"trimtab: error: {one_line(message)} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments, without the program's name; None takes those of the process.

    Returns:
        The exit code: 0 when all went well, 2 when what was given cannot be used, 1 when the machine failed
        (a full disk, a picture of NaN) or some of many jobs failed, 130 when interrupted. Errors are one line on
        stderr.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its line, or the help or the version
        return int(stop.code or 0)
    try:
        with warnings.catch_warnings():  # a command may set filters
            args.run(args)
    except UsageError as error:
        print(f"trimtab: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except (OSError, FloatingPointError, MemoryError, FailedJobs) as error:
        print(f"trimtab: error: {one_line(first_line(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("trimtab: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="trimtab",
        description="Steers frozen diffusion and flow models at inference time.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trimtab {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (generate, edit, optimize, reconstruct, tune, protect, demo, info, bench, export_pipeline, app):
        command.add_parser(subparsers)
    return parser
