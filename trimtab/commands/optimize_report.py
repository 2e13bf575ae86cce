"""What ``trimtab optimize`` draws: a strip of the improvements and the curve of the reward."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trimtab.commands.edit import as_picture, strip

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Improvements", "curve"]

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
