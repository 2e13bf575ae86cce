"""A small chart of curves as SVG: alike in every browser, and read out by screen readers."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

__all__ = ["curve_svg"]

_WIDTH, _HEIGHT = 640, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 26, 34
_COLOURS = ("#8795a8", "#6366f1")


def curve_svg(curves: Mapping[str, Sequence[float]], x_title: str, y_title: str) -> str:
    """Curves over 0, 1, 2, ... as an SVG element.

    Args:
        curves: two at most, by name, the important one last; values that are not finite leave gaps.
        x_title: what the numbers from 0 on are.
        y_title: what the values are.

    Returns:
        The element, with a description for screen readers; an empty frame where there are no values.

    Example:
        >>> "reward" in curve_svg({"best": [0.1, 0.4]}, "iteration", "reward")
        True
    """
    finite = [value for values in curves.values() for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - margin, high + margin
    last = max([1, *(len(values) - 1 for values in curves.values())])

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last
        return round(x, 1), round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low), 1)

    parts = []
    for tick in _ticks(low, high) if finite else ():
        _, y = place(0, tick)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".15"/>'
        )
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:.4g}</text>')
    for tick in dict.fromkeys(round(value) for value in _ticks(0, last) if value <= last):
        x, _ = place(tick, low)
        parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick}</text>')
    for number, (name, values) in enumerate(curves.items()):
        colour = _COLOURS[number]
        points = [place(step, value) for step, value in enumerate(values) if math.isfinite(value)]
        if len(points) > 1:
            line = " ".join(f"{x},{y}" for x, y in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{1.5 + number}"/>')
        if number == 0 or len(points) == 1:
            parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in points]
        x = _LEFT + 130 * number
        parts.append(f'<rect x="{x}" y="6" width="14" height="4" rx="2" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="12">{html.escape(name)}</text>')
    parts.append(
        f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(x_title)}</text>'
    )
    frame = f"M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"
    parts.append(f'<path d="{frame}" fill="none" stroke="currentColor" opacity=".5"/>')
    told = html.escape(_told(curves, x_title, y_title))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{told}" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{told}</title>{''.join(parts)}</svg>"
    )


def _told(curves: Mapping[str, Sequence[float]], x_title: str, y_title: str) -> str:
    """The curves in words."""
    last = {name: [value for value in values if math.isfinite(value)] for name, values in curves.items()}
    told = [f"{name} from {values[0]:.4g} to {values[-1]:.4g}" for name, values in last.items() if values]
    return f"{y_title} over {x_title}: {'; '.join(told)}" if told else f"{y_title} over {x_title}: nothing yet"


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers in a range."""
    raw = (high - low) / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]
