"""What ``trimtab optimize`` draws: a strip of the improvements and the curve of the reward."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.commands.edit import as_picture, strip
from trimtab.commands.job_runner import Outcome
from trimtab.commands.optimize_curvature import report_curvature
from trimtab.commands.pictures import save_png, write_json

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Improvements", "curve", "write_optimized"]

MOST_PICTURES = 8


class Improvements:
    """The pictures of each sample that were better than all before; give it to ``callback_on_iteration_end``."""

    def __init__(self) -> None:
        self._kept: dict[int, list[tuple[int, float, Image]]] = {}

    def __call__(self, pipe: Any, step: int, state: Any) -> None:
        """Keeps the new best pictures, and the first one of each sample."""
        for row in range(len(state.rewards)):
            if step == 0 or bool(state.improved[row]):
                picture = as_picture(state.images[row].float().cpu())
                self._kept.setdefault(row, []).append((step, float(state.rewards[row]), picture))

    def strip(self, row: int, best_step: int) -> "Image":
        """The sample's first picture, its best, framed, and some between them, each with its iteration and reward."""
        kept = [entry for entry in self._kept[row] if entry[0] <= best_step]
        count = min(len(kept), MOST_PICTURES)
        places = {round(i * (len(kept) - 1) / max(count - 1, 1)) for i in range(count)}
        shown = [kept[place] for place in sorted(places)]
        labels = [f"{step}: reward {reward:.3g}" for step, reward, _ in shown]
        return strip([picture for *_, picture in shown], labels, marked=len(shown) - 1)


def write_optimized(
    result: Any,
    row: int,
    job: Mapping[str, Any],
    name: str,
    improvements: Improvements,
    seconds: float,
    spectrum: Any,
    folder: Path,
) -> Outcome:
    """Writes what became of one picture, its JSON last.

    Args:
        result: of the batch.
        row: the picture's.
        job: its settings.
        name: of its files.
        improvements: of the batch.
        seconds: that it took.
        spectrum: of the reward's Hessian at its noise, or None.
        folder: where to.
    """

    def column(values: Any) -> list[float | None]:
        return [value if value == value else None for value in values[:, row].tolist()]  # JSON has no NaN

    best = int(result.best_step[row])
    rewards = result.rewards[:, row].tolist()
    watched = None if result.monitor is None else result.monitor[:, row].tolist()
    paths = [folder / f"{name}{ending}" for ending in (".png", "-strip.png", "-rewards.png", ".json")]
    made_by = {"prompt": job["prompt"], "seed": job["seed"], "settings": dict(job)}
    save_png(result.images[row], paths[0], made_by)
    save_png(improvements.strip(row, best), paths[1], made_by)
    save_png(curve(rewards, watched), paths[2], made_by)
    content = {
        "job": dict(job),
        "best_step": best,
        "initial_reward": column(result.rewards)[0],
        "best_reward": column(result.rewards)[best],
        "rewards": column(result.rewards),
        "terms": {name: column(values) for name, values in result.terms.items()},
        "monitor": None if result.monitor is None else column(result.monitor),
        "norms": column(result.norms),
        "stopped": result.stopped[row],
        "interrupted": result.interrupted,
        "evaluations": result.num_evaluations,
        "files": [path.name for path in paths[:3]],
    }
    ended = f" ({result.stopped[row]})" if result.stopped[row] else ""
    if spectrum is not None:
        drawing = folder / f"{name}-curvature.png"
        content["curvature"] = report_curvature(spectrum, drawing, made_by)
        content["files"].append(drawing.name)
        ended += f", curvature up to {spectrum.lambda_max:.3g}: steps below {spectrum.max_learning_rate:.3g} are stable"
    write_json(paths[3], content)
    figures = {key: content[key] for key in ("initial_reward", "best_reward", "best_step", "stopped", "evaluations")}
    said = f"{paths[1]}  reward {rewards[0]:.4g} -> {rewards[best]:.4g} at iteration {best}{ended}"
    files = [*content["files"], paths[3].name]
    return Outcome(files, {**figures, "seconds": seconds}, [said], interrupted=result.interrupted)


def curve(rewards: Sequence[float], monitor: Sequence[float] | None = None) -> "Image":
    """The reward of each iteration in grey and the best so far in black; a held-out reward below it.

    Args:
        rewards: one an iteration; a NaN is left out.
        monitor: the same of the held-out reward.
    """
    from PIL import Image

    best, so_far = [], -math.inf
    for value in rewards:
        so_far = max(so_far, value) if math.isfinite(value) else so_far
        best.append(so_far)
    panels = [_panel("reward", [(rewards, "#9aa5b1"), (best, "black")])]
    if monitor is not None:
        panels.append(_panel("held-out reward", [(monitor, "#2f6fab")]))
    sheet = Image.new("RGB", (panels[0].width, sum(panel.height for panel in panels)), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (0, index * panel.height))
    return sheet


def _panel(title: str, lines: Sequence[tuple[Sequence[float], str]]) -> "Image":
    from PIL import Image, ImageDraw, ImageFont

    width, height, left, right, top, bottom = 480, 240, 64, 16, 28, 34
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    finite = [value for values, _ in lines for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    high = high if high > low else low + 1.0
    steps = max(len(lines[0][0]) - 1, 1)

    def place(step: int, value: float) -> tuple[float, float]:
        x = left + (width - left - right) * step / steps
        return x, top + (height - top - bottom) * (high - value) / (high - low)

    draw.text((left, 6), title, fill="black", font=font)
    draw.line([place(0, high), place(0, low), place(steps, low)], fill="black")
    for value in (low, high):
        text = f"{value:.3g}"
        draw.text((left - 8 - font.getlength(text), place(0, value)[1] - 7), text, fill="black", font=font)
    draw.text((left, height - bottom + 8), "0", fill="black", font=font)
    last = f"iteration {len(lines[0][0]) - 1}"
    draw.text((width - right - font.getlength(last), height - bottom + 8), last, fill="black", font=font)
    for values, colour in lines:
        points = [place(step, value) for step, value in enumerate(values) if math.isfinite(value)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=2, joint="curve")
        for x, y in points[:1] if len(points) == 1 else []:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    return image
