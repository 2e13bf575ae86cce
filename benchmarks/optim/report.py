"""Rows of the optimization benchmarks and where they are written."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from trimtab.commands.pictures import write_json

__all__ = ["RESULTS", "Row", "print_rows", "write_report"]

RESULTS = Path(__file__).parents[1] / "results" / "optim"


@dataclass(frozen=True)
class Row:
    """One claim.

    Attributes:
        what: what is compared.
        ours: the figure of the method here.
        baseline: the figure that it is compared with.
        asked: the margin asked for, in words.
        holds: whether it was met.
    """

    what: str
    ours: float
    baseline: float
    asked: str
    holds: bool


def print_rows(rows: list[Row]) -> None:
    """Prints a table."""
    print(f"{'what':72} {'ours':>11} {'baseline':>11}  asked")
    for row in rows:
        print(f"{row.what:72} {row.ours:11.4g} {row.baseline:11.4g}  {row.asked}: {'yes' if row.holds else 'NO'}")


def write_report(name: str, rows: list[Row], settings: dict, out: Path = RESULTS) -> None:
    """Prints the rows and writes them, with the settings and the machine, to ``NAME.json``."""
    print_rows(rows)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "platform": platform.machine()}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    report = {"settings": settings, "machine": machine, "rows": [asdict(row) for row in rows]}
    write_json(path, report)
    print(f"written to {path}")
