"""The picture of ``guidance_rules``: a row a figure, a column a kind of rule, plain guidance in grey in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.benchmarks.figures import proportion_interval
from trimtab.benchmarks.guidance_rules import NONE

__all__ = ["plot"]

COLUMNS = {
    "the difference reshaped": ("apg", "rescale", "tcfg", "cfg-zero"),
    "by noise level, size or frequency": ("interval", "mambo-g", "fdg"),
    "away from a weakened model": ("pag", "seg", "slg", "autoguidance"),
    "CFG++": ("cfg++",),
}
ROWS = {
    "match": "captions matched",
    "saturation": "saturation",
    "contrast": "contrast",
    "frechet": "Fréchet distance",
}
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")  # Okabe and Ito's, told apart by most eyes
_MARKS = ("o", "s", "^", "D")
_AGREE_AT_1 = ("cfg", "apg", "rescale", "tcfg", "cfg-zero", "interval", "mambo-g", "autoguidance")


def plot(report: dict[str, Any], path: Path) -> None:
    """Writes the picture.

    Args:
        report: as ``guidance_rules.run`` returns it.
        path: of the PNG.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), dpi=90, layout="constrained")
    axes = figure.subplots(len(ROWS), len(COLUMNS), sharey="row", sharex="col")
    lines = _lines(report)
    for column, (title, rules) in enumerate(COLUMNS.items()):
        axes[0, column].set_title(title, fontsize=10)
        share = rules == ("cfg++",)
        for row, (figure_name, label) in enumerate(ROWS.items()):
            axis = axes[row, column]
            axis.axhline(_of_scenes(report, figure_name), color="black", linestyle=":", linewidth=1, label="scenes")
            if not share:
                _draw(axis, lines.get("cfg", []), figure_name, color="0.55", marker=".", label="cfg")
            for rule, colour, mark in zip(rules, _COLOURS, _MARKS, strict=False):
                _draw(axis, lines.get(rule, []), figure_name, color=colour, marker=mark, label=rule)
            if not column:
                axis.set_ylabel(label, fontsize=9)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.25)
            if not share:
                axis.set_xscale("log")
                axis.set_xticks([1, 2, 3, 5, 7, 10, 15, 20], labels=["1", "2", "3", "5", "7", "10", "15", "20"])
                axis.minorticks_off()
        axes[-1, column].set_xlabel("λ" if share else "w", fontsize=9)
        axes[1, column].legend(fontsize=8, loc="upper left")
    settings = report["settings"]
    figure.suptitle(
        f"{settings['num_captions']} held-out captions, {settings['steps']} steps; bars: 95 % intervals", fontsize=10
    )
    figure.savefig(path, metadata={"Software": None})


def _lines(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Each rule's cells by scale; no guidance is w = 1 of the rules that agree there."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for cell in sorted(report["cells"], key=lambda cell: cell["scale"]):
        for rule in _AGREE_AT_1 if cell["rule"] == NONE else (cell["rule"],):
            lines.setdefault(rule, []).append(cell)
    return lines


def _of_scenes(report: dict[str, Any], name: str) -> float:
    scenes = report["scenes"]
    return scenes.get(f"mean_{name}", scenes[name])


def _draw(axis: Any, cells: list[dict[str, Any]], name: str, **style: Any) -> None:
    scales, values = [cell["scale"] for cell in cells], [cell[name] for cell in cells]
    if name != "match":
        axis.plot(scales, values, markersize=4, linewidth=1.3, **style)
        return
    rights = [cell["pictures"]["right"] for cell in cells]
    bounds = [proportion_interval(right.count("1"), len(right)) for right in rights]
    errors = [
        [value - low for value, (low, _) in zip(values, bounds, strict=True)],
        [high - value for value, (_, high) in zip(values, bounds, strict=True)],
    ]
    axis.errorbar(scales, values, yerr=errors, markersize=4, linewidth=1.3, elinewidth=0.6, capsize=0, **style)
