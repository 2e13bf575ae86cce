"""``trimtab bench``: what the README claims, measured on this machine."""

from typing import Any

from trimtab.commands import bench_editing, bench_geometry, bench_guidance

__all__ = ["BENCHMARKS", "add_parser"]

BENCHMARKS = (bench_guidance, bench_editing, bench_geometry)
"""One file each, with ``add_parser`` and ``run`` as a command's; the measuring is in ``trimtab.benchmarks``."""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its benchmarks."""
    parser = subparsers.add_parser(
        "bench",
        help="measures what the README claims",
        description="Measures what the README claims: tables, JSON and plots.",
        allow_abbrev=False,
    )
    inner = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    for benchmark in BENCHMARKS:
        benchmark.add_parser(inner)
