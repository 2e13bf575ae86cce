"""The picture of ``editing``: success against preservation, a line a method over its knob."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.benchmarks.figures import proportion_interval

__all__ = ["plot"]

PANELS = {"psnr_outside": "PSNR outside of the edit (dB)", "psnr_inside": "PSNR inside of the edit (dB)"}
_COLOURS = {  # Okabe and Ito's, told apart by most eyes
    "flowopt": "#d55e00",
    "flowedit": "#0072b2",
    "sdedit": "#999999",
    "ode-inversion": "#000000",
    "uni-inv": "#009e73",
    "rf-inversion": "#cc79a7",
    "rf-solver": "#e69f00",
    "fireflow": "#56b4e9",
}
_STYLES = {None: "-", "local": "-", "none": ":", "anderson": "-.", "inverse": "--"}
_MARKS = dict(zip(_COLOURS, "osxD^vP*", strict=True))


def plot(report: dict[str, Any], path: Path) -> None:
    """Writes the picture.

    Args:
        report: as ``editing.run`` returns it.
        path: of the PNG.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
        ceiling = report["references"]["autoencoder"][name]
        axis.axvline(sum(ceiling) / len(ceiling), color="black", linestyle=":", linewidth=1, label="autoencoder")
        for run in dict.fromkeys((cell["method"], _line(cell)) for cell in report["cells"]):
            _draw(axis, [cell for cell in report["cells"] if (cell["method"], _line(cell)) == run], name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("edits that the judge finds right")
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes[-1].legend(unique.values(), unique.keys(), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _line(cell: dict[str, Any]) -> str:
    """Of FlowOpt a line a run, through its iterates; of another method one line through all its cells."""
    return cell["run"] if cell["method"] == "flowopt" else ""


def _draw(axis: Any, points: list[dict[str, Any]], name: str) -> None:
    method, options = points[0]["method"], points[0]["options"]
    form = "local" if options.get("locality") else options.get("acceleration")
    x = [sum(point[name]) / len(point[name]) for point in points]
    y = [sum(point["success"]) / len(point["success"]) for point in points]
    bounds = [proportion_interval(int(sum(point["success"])), len(point["success"])) for point in points]
    errors = [
        [max(0.0, value - low) for value, (low, _) in zip(y, bounds, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(y, bounds, strict=True)],
    ]
    axis.errorbar(
        x,
        y,
        yerr=errors,
        color=_COLOURS[method],
        marker=_MARKS[method],
        label=method if form is None else f"{method}, {form}",
        linestyle=_STYLES[form],
        linewidth=1.2,
        elinewidth=0.5,
        alpha=0.9,
    )
