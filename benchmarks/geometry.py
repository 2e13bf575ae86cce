"""The geometry's claims: how fast sliced Wasserstein is, what memory it takes, what it makes of a cloud.

    python benchmarks/geometry.py                    # speed, memory, scaling, chamfer, gradient flow
    python benchmarks/geometry.py --parts losses     # the paper's table of losses in small
    trimtab bench geometry                           # the same

The claims, at 32 clouds of 2,048 points and 100 slices, both sides timed in one run: with the gradient in one cloud at
least 20 times as fast as POT cloud by cloud and 3 times as fast as a batched torch.sort, with gradients in both at
least 12 times as fast as POT, the value alone at least 50 times; at most 64 MB beside the inputs; N log N in time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.commands import bench_geometry
from trimtab.commands.pictures import write_json
from trimtab.geometry import chamfer_distance, sample_directions, sliced_wasserstein

__all__ = ["main", "measure"]

Rows = list[dict[str, Any]]


def batch(clouds: int, points: int, dim: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Two batches of clouds and 100 directions, seeded."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(clouds, points, dim, generator=generator) for _ in range(2))
    return x, y, sample_directions(100, dim, generator=generator)


def medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turn so that the machine's other work meets all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def pot_loop(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    """POT, a cloud at a time: the sum over clouds of the squared distance."""
    import ot

    return sum(ot.sliced_wasserstein_distance(a, b, projections=theta.T) ** 2 for a, b in zip(x, y, strict=True))


def torch_sort(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    """The batched form that one would write: project, torch.sort, subtract."""
    u, v = (theta @ points.mT for points in (x, y))
    return (u.sort(-1).values - v.sort(-1).values).square().mean((1, 2)).sum()


def ours(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    """This package."""
    return sliced_wasserstein(x, y, projections=theta).sum()


METHODS = {"POT, cloud by cloud": pot_loop, "batched torch.sort": torch_sort, "trimtab": ours}


def gradients(method: Callable[..., Tensor], x: Tensor, y: Tensor, theta: Tensor, wanted: str) -> tuple[Tensor, ...]:
    """The value and the gradients in the clouds that ``wanted`` names."""
    inputs = {name: cloud.detach().clone().requires_grad_(name in wanted) for name, cloud in (("x", x), ("y", y))}
    value = method(*inputs.values(), theta)
    asked = [cloud for cloud in inputs.values() if cloud.requires_grad]
    return (value.detach(), *(torch.autograd.grad(value, asked) if asked else ()))


def speed(repeats: int, clouds: int, points: int) -> Rows:
    """Seconds of value, gradient in x, gradients in both, of the three methods, which must agree."""
    x, y, theta = batch(clouds, points)
    rows = []
    for wanted, label in (("", "value"), ("x", "value, gradient in x"), ("xy", "value, gradients in x and y")):
        calls = {
            name: (lambda method=method, wanted=wanted: gradients(method, x, y, theta, wanted))
            for name, method in METHODS.items()
        }
        results = {name: call() for name, call in calls.items()}
        reference = results["POT, cloud by cloud"]
        errors = [
            max(
                ((got - want).abs().max() / want.abs().max()).item()
                for got, want in zip(result, reference, strict=True)
            )
            for result in results.values()
        ]
        seconds = medians(calls, repeats)
        rows.append(
            {
                "what": label,
                "clouds": clouds,
                "points": points,
                **{f"{name}, ms": 1e3 * value for name, value in seconds.items()},
                "times POT": seconds["POT, cloud by cloud"] / seconds["trimtab"],
                "times torch.sort": seconds["batched torch.sort"] / seconds["trimtab"],
                "largest relative difference": max(errors),
            }
        )
    return rows


_MEMORY = """
from trimtab.benchmarks import geometry as g
x, y, theta = g.batch({clouds}, {points})
call = lambda x, y: {call}
call(x[:1, :64], y[:1, :64])
before = g.peak_memory(reset=True)
call(x, y)
print(g.peak_memory() - before)
"""


def peak_memory(*, reset: bool = False) -> float:
    """MB that this process has held at most, or holds now where ``reset`` lets Linux forget earlier peaks."""
    status = Path("/proc/self/status")
    if not status.is_file():  # elsewhere the peak cannot be reset, and what imports left free hides small needs
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def extra_memory(call: str, clouds: int, points: int) -> float:
    """MB by which a fresh process grows in one call."""
    return printed_by(_MEMORY.format(call=call, clouds=clouds, points=points))


def printed_by(code: str) -> float:
    """The number that code prints last in a fresh process that finds this checkout's modules."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def memory(clouds: int, points: int) -> Rows:
    """MB beside the inputs, of value and both gradients."""
    rows = []
    for name, method in (("trimtab", "g.ours"), ("batched torch.sort", "g.torch_sort")):
        call = f"g.gradients({method}, x, y, theta, 'xy')"
        rows.append({"method": name, "clouds": clouds, "points": points, "MB": extra_memory(call, clouds, points)})
    return rows


def scaling(largest: int) -> Rows:
    """Seconds and MB of value and gradient in x for one cloud, from 256 points on."""
    rows = []
    points = 256
    while points <= largest:
        x, y, theta = batch(1, points)
        call = lambda x=x, y=y, theta=theta: gradients(ours, x, y, theta, "x")  # noqa: E731
        call()
        seconds = medians({"ours": call}, 7)["ours"]
        megabytes = extra_memory("g.gradients(g.ours, x, y, theta, 'x')", 1, points)
        log = seconds / (points * math.log2(points)) * 1e9
        rows.append({"points": points, "ms": 1e3 * seconds, "ns / (N log2 N)": log, "MB": megabytes})
        points *= 4
    return rows


def dense_chamfer(x: Tensor, y: Tensor) -> Tensor:
    """The form with a table of all distances."""
    table = torch.cdist(x, y).square()
    return table.min(2).values.mean(1) + table.min(1).values.mean(1)


def chamfer(points: int) -> Rows:
    """Seconds and MB of value and gradient at many points, against the dense form."""
    x, y, _ = batch(1, points)
    calls = {"trimtab": lambda: chamfer_distance(x.requires_grad_(), y).sum().backward()}
    calls["dense"] = lambda: dense_chamfer(x.requires_grad_(), y).sum().backward()
    seconds = medians(calls, 3)
    ways = {"trimtab": "g.chamfer_distance", "dense": "g.dense_chamfer"}
    return [
        {
            "method": name,
            "points": points,
            "ms": 1e3 * seconds[name],
            "MB": extra_memory(f"{way}(x.requires_grad_(), y).sum().backward()", 1, points),
        }
        for name, way in ways.items()
    ]


def measure(parts: list[str], output: Path, *, quick: bool = False) -> dict[str, Rows]:
    """Runs parts, prints their tables and writes ``geometry.json``, keeping what other runs measured there.

    Args:
        parts: some of ``bench_geometry.PARTS``.
        output: folder, made if missing.
        quick: on small sizes, to see that all runs.
    """
    from trimtab.benchmarks import geometry_flow, geometry_losses

    calls: dict[str, Callable[[], Rows]] = {
        "speed": lambda: speed(1 if quick else 7, 4 if quick else 32, 128 if quick else 2048),
        "memory": lambda: memory(4 if quick else 32, 128 if quick else 2048),
        "scaling": lambda: scaling(1024 if quick else 65_536),
        "chamfer": lambda: chamfer(256 if quick else 16_384),
        "flow": lambda: geometry_flow.flow(output, quick=quick),
        "losses": lambda: geometry_losses.losses(output, quick=quick),
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / "geometry.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in parts:
        rows = calls[part]()
        results[part] = rows
        print(f"\n{part}\n{table(rows)}", flush=True)
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "quick": quick}
        results.setdefault("machine", {})[part] = machine
        write_json(path, results)
    if "scaling" in results:
        plot_scaling(results["scaling"], output / "geometry_scaling.png")
    print(f"\nwritten to {path}")
    return results


def table(rows: Rows) -> str:
    """Rows as a Markdown table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names)]
    lines += [[f"{row[n]:.4g}" if isinstance(row[n], float) else str(row[n]) for n in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot_scaling(rows: Rows, path: Path) -> None:
    """Time and memory against N, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 3), layout="constrained")
    points = [row["points"] for row in rows]
    for axes, name in zip(figure.subplots(1, 2), ("ms", "MB"), strict=True):
        axes.loglog(points, [max(row[name], 1e-2) for row in rows], "o-", label="measured")
        if name == "ms":
            reference = rows[-1][name] / (points[-1] * math.log(points[-1]))
            axes.loglog(points, [reference * n * math.log(n) for n in points], "--", label="N log N")
            axes.legend()
        axes.set(xlabel="points N", ylabel=name)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bench_geometry.add_arguments(parser, str(Path(__file__).parent / "results"))
    options = parser.parse_args(arguments)
    measure(options.parts, Path(options.output), quick=options.quick)


if __name__ == "__main__":
    main()
