"""Iterations to a relative residual of 1e-4 of Poisson's equation: deep conjugate directions beside what is usual.

The claim: a network trained at 32 and 64 pixels a side keeps its few iterations up to 512, on masks that it has not
seen and with a coefficient that varies smoothly, where conjugate gradients' grow with the side. The times are there
too: multigrid needs about as few iterations and is faster on a CPU. Beyond the network are 1,024 pixels a side and a
coefficient that jumps: 100 iterations do not do.

    python -m trimtab.benchmarks.optim.conjugate_directions [--largest 1024] [--kinds white smooth point]
        [--leave-out "deflated CG" IC-CG]

Beside it: CG, CG with incomplete Cholesky IC(0), CG deflated by 16 blocks, CG with multigrid. All is in float64 but the
network. Times are the processor's for the solve alone, in one thread; set-up (IC's takes many seconds at 1,024) is not
in them. Rows already measured are kept in the results file's ``.partial`` and not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from trimtab.benchmarks.optim.report import RESULTS, Row, write_report
from trimtab.commands.pictures import write_json
from trimtab.optim.solvers import (
    DeepDirections,
    GridPoisson,
    Multigrid,
    block_deflation,
    conjugate_directions,
    incomplete_cholesky,
    sparse_matvec,
)

METHODS = ("CG", "deflated CG", "IC-CG", "multigrid-CG", "DCDM")
SIZES = (64, 128, 256, 512, 1024)
DOMAINS = ("star", "rings", "smooth coefficient", "jumping coefficient")
DOMAIN_SIZE = 256
LARGEST_ALL_KINDS = 512
NOT_SOLVED = 10**9
PICTURE = Path(__file__).parents[2] / "docs" / "conjugate_directions.png"


def right_side(kind: str, size: int, seed: int = 123) -> Tensor:
    """White noise, a smooth field, or a point source; (size, size) float64."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "white":
        return torch.randn(size, size, generator=generator, dtype=torch.float64)
    if kind == "smooth":
        knots = torch.randn(1, 1, 6, 6, generator=generator, dtype=torch.float64)
        return interpolate(knots, size=(size, size), mode="bicubic")[0, 0]
    b = torch.zeros(size, size, dtype=torch.float64)
    b[size // 3, size // 2] = 1
    return b


def operator(domain: str, size: int) -> GridPoisson:
    """The full square, or a mask or coefficient of a kind that training has none of."""
    row, column = torch.meshgrid(*[(torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5] * 2, indexing="ij")
    radius, angle = (row.square() + column.square()).sqrt(), torch.atan2(row, column)
    mask, coefficient = torch.ones(size, size, dtype=torch.bool), None
    if domain == "star":
        mask = radius < 0.32 + 0.15 * torch.cos(5 * angle)
    elif domain == "rings":
        mask = (torch.cos(40 * radius) > -0.4) & (radius < 0.49) | ((row.abs() < 0.03) & (column.abs() < 0.45))
    elif domain == "smooth coefficient":
        coefficient = 10.0 ** (torch.sin(7 * row) * torch.cos(5 * column))  # 1 : 100
    elif domain == "jumping coefficient":
        coefficient = torch.where((radius - 0.3).abs() < 0.06, 100.0, 1.0).double()
    return GridPoisson(mask, coefficient, dtype=torch.float64)


def solve(method: str, A: GridPoisson, b: Tensor) -> tuple[int, float]:
    """Iterations, `NOT_SOLVED` where it did not get there, and seconds."""
    inside, limit = A.mask.bool(), 100 if method == "DCDM" else 8000
    matvec: Callable[[Tensor], Tensor] = A
    propose, deflation, right = None, None, b * A.mask
    if method == "deflated CG":
        deflation = block_deflation(inside)
    elif method == "multigrid-CG":
        propose = Multigrid(A)
    elif method == "DCDM":
        propose = DeepDirections(A)
    elif method == "IC-CG":
        matrix = A.sparse()
        matvec, propose, right = sparse_matvec(matrix), incomplete_cholesky(matrix), b[inside].double()
    start = time.thread_time()
    found = conjugate_directions(
        matvec, right, propose=propose, deflation=deflation, tolerance=1e-4, max_iterations=limit, recompute_every=50
    )
    seconds = time.thread_time() - start
    left = b[inside] - A(found.x)[inside] if method != "IC-CG" else right - matvec(found.x)
    if not found.converged or float(left.norm()) > 2e-4 * float(right.norm()):
        return NOT_SOLVED, seconds
    return found.iterations, seconds


def measured(
    sizes: tuple[int, ...], kinds: tuple[str, ...], left_out: tuple[str, ...], partial: Path
) -> dict[str, dict]:
    """Iterations and seconds by "domain|kind|size|method", those of an interrupted run first."""
    known: dict[str, dict] = json.loads(partial.read_text()) if partial.exists() else {}
    jobs = [("square", kinds[0], size) for size in sizes]
    jobs += [(domain, kinds[0], DOMAIN_SIZE) for domain in DOMAINS if max(sizes) >= DOMAIN_SIZE]
    jobs += [("square", kind, size) for kind in kinds[1:] for size in sizes if size <= LARGEST_ALL_KINDS]
    for domain, kind, size in jobs:
        A, b = operator(domain, size), right_side(kind, size)
        for method in reversed(METHODS):
            key = f"{domain}|{kind}|{size}|{method}"
            if key not in known and not (size == SIZES[-1] and method in left_out):
                iterations, seconds = solve(method, A, b)
                known[key] = {"iterations": iterations, "seconds": round(seconds, 3)}
                print(f"{key}: {iterations} iterations, {seconds:.2f} s", flush=True)
                write_json(partial, known)
    return known


def rows_of(known: dict[str, dict], sizes: tuple[int, ...], kinds: tuple[str, ...]) -> list[Row]:
    """The claims."""

    def count(domain: str, kind: str, size: int, method: str) -> float:
        return known.get(f"{domain}|{kind}|{size}|{method}", {"iterations": math.nan})["iterations"]

    rows = []
    for size in sizes:
        for kind in kinds:
            ours = count("square", kind, size, "DCDM")
            for other in METHODS[:-1]:
                theirs = count("square", kind, size, other)
                if math.isnan(ours) or math.isnan(theirs):
                    continue
                asked, holds = ("fewer", ours < theirs) if other != "multigrid-CG" else ("beside it", True)
                rows.append(Row(f"iterations, {size} px, {kind}: DCDM, {other}", ours, theirs, asked, holds))
    # Growth is told up to the largest side at which every method got there.
    solved = [size for size in sizes if all(count("square", kinds[0], size, name) < NOT_SOLVED for name in METHODS)]
    span = math.log(solved[-1] / solved[0])
    growth = {
        name: math.log(count("square", kinds[0], solved[-1], name) / count("square", kinds[0], solved[0], name)) / span
        for name in METHODS
    }
    for other in METHODS[:-1]:
        asked, holds = ("half", growth["DCDM"] <= growth[other] / 2) if other != "multigrid-CG" else ("beside it", True)
        what = f"growth, iterations ~ side^, {solved[0]} to {solved[-1]} px: DCDM, {other}"
        rows.append(Row(what, growth["DCDM"], growth[other], asked, holds))
    for domain in DOMAINS:
        if f"{domain}|{kinds[0]}|{DOMAIN_SIZE}|DCDM" not in known:
            continue
        ours = count(domain, kinds[0], DOMAIN_SIZE, "DCDM")
        for other in METHODS[:-1]:
            theirs = count(domain, kinds[0], DOMAIN_SIZE, other)
            asked, holds = ("fewer", ours < theirs) if other != "multigrid-CG" else ("beside it", True)
            rows.append(Row(f"iterations, {DOMAIN_SIZE} px, {domain}: DCDM, {other}", ours, theirs, asked, holds))
    for size in sizes:
        ours = known[f"square|{kinds[0]}|{size}|DCDM"]["seconds"]
        for other in ("CG", "multigrid-CG"):
            if f"square|{kinds[0]}|{size}|{other}" not in known:
                continue
            theirs = known[f"square|{kinds[0]}|{size}|{other}"]["seconds"]
            rows.append(Row(f"seconds on a CPU, {size} px: DCDM, {other}", ours, theirs, "beside it", True))
    return rows


def plot(known: dict[str, dict], sizes: tuple[int, ...], kind: str, path: Path) -> None:
    """Iterations and seconds against the side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = ("#999999", "#0072b2", "#009e73", "#cc79a7", "#d55e00")  # Okabe and Ito's
    for method, colour, mark in zip(METHODS, colours, ("o", "s", "^", "v", "D"), strict=True):
        found = {size: known.get(f"square|{kind}|{size}|{method}") for size in sizes}
        found = {size: value for size, value in found.items() if value and value["iterations"] < NOT_SOLVED}
        for axis, name in ((left, "iterations"), (right, "seconds")):
            values = [value[name] for value in found.values()]
            axis.plot(list(found), values, color=colour, marker=mark, markersize=4, label=method)
    for axis, label in ((left, "iterations to 1e-4"), (right, "seconds, one CPU thread")):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sizes, labels=[str(size) for size in sizes])
        axis.set_xlabel("pixels a side")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
    left.axvline(64, color="black", linestyle=":", linewidth=1)
    left.annotate("trained up to here", (64, 3), (70, 3), fontsize=8)
    left.legend(fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--largest", type=int, default=SIZES[-1], choices=SIZES, help="default: 1024")
    add("--kinds", nargs="+", default=("white", "smooth", "point"), choices=("white", "smooth", "point"))
    add("--leave-out", nargs="+", default=(), choices=METHODS, help="methods not run at the largest side of all")
    add("--picture", type=Path, default=PICTURE, help="default: docs/conjugate_directions.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes, kinds = tuple(size for size in SIZES if size <= options.largest), tuple(options.kinds)
    partial = RESULTS / "conjugate_directions.partial"
    known = measured(sizes, kinds, tuple(options.leave_out), partial)
    settings = {"tolerance": 1e-4, "trained_at": [32, 64], "largest": options.largest}
    settings |= {"left_out": list(options.leave_out), "measured": known}
    write_report("conjugate_directions", rows_of(known, sizes, kinds), settings)
    plot(known, sizes, kinds[0], options.picture)
    partial.unlink()
    print(f"drawn to {options.picture}")


if __name__ == "__main__":
    main()
