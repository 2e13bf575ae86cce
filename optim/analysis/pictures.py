"""Drawings of spectra and of what attention selects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from .attention_margin import HeadMargin
    from .hessian import SpectrumResult

__all__ = ["margin_picture", "spectrum_picture"]

DECADES = 7
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 64, 20, 34, 44


def spectrum_picture(spectrum: SpectrumResult, title: str = "Hessian's eigenvalues") -> Image:
    """A spectrum's density on a logarithmic axis, its known outliers marked below.

    Returns:
        An RGB picture, 640 x 320.
    """
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    grid, density = spectrum.grid, spectrum.density.clamp_min(1e-300).log10()
    low, high = float(grid[0]), float(grid[-1])
    peak = math.ceil(float(density.max()))
    floor = peak - DECADES

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    def y(exponent: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (peak - max(exponent, floor)) / DECADES

    words = f"{title}: n = {spectrum.size:,}, largest {spectrum.lambda_max:.3g}, smallest {spectrum.lambda_min:.3g}"
    outliers = spectrum.num_outliers
    if outliers:
        words += f", {outliers} above a gap of {spectrum.gap_ratio:.1f}x"
    draw.text((LEFT, 10), words, fill="black", font=font)
    for exponent in range(floor, peak + 1):
        draw.line([(LEFT, y(exponent)), (WIDTH - RIGHT, y(exponent))], fill="#e4e7eb")
        label = f"1e{exponent}"
        draw.text((LEFT - 8 - font.getlength(label), y(exponent) - 7), label, fill="black", font=font)
    for value in {low, high} | ({0.0} if low < 0 < high else set()):
        label = f"{value:.2g}"
        draw.line([(x(value), TOP), (x(value), HEIGHT - BOTTOM)], fill="#9aa5b1")
        place = min(max(x(value) - font.getlength(label) / 2, 4), WIDTH - 4 - font.getlength(label))
        draw.text((place, HEIGHT - BOTTOM + 20), label, fill="black", font=font)
    points = [(x(a), y(b)) for a, b in zip(grid.tolist(), density.tolist(), strict=True)]
    draw.polygon([(points[0][0], y(floor)), *points, (points[-1][0], y(floor))], fill="#c9dcf2")
    draw.line(points, fill="#2f6fab", width=2)
    for value in spectrum.top[:outliers].tolist():
        place = x(value)
        draw.polygon([(place, y(floor) + 2), (place - 5, y(floor) + 11), (place + 5, y(floor) + 11)], fill="#c0392b")
    return image


def margin_picture(heads: Sequence[HeadMargin], words: Sequence[str], *, most: int = 40) -> Image:
    """A row for each head, a column for each token: the darker, the more of the head's queries select it.

    Beside each row the median margin in nats and, where it is known, the part of the best margin that is reached; heads
    whose attention is no selection are grey.

    Args:
        heads: of `attention_margin`, all of one row of the batch and of the same tokens.
        words: one for each token, or for every column of the keys.
        most: rows that are drawn: those with the largest margins, in their order.

    Returns:
        An RGB picture.

    Raises:
        ValueError: no heads, heads of several token sets, or fewer words than tokens.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not heads or any(head.tokens.tolist() != heads[0].tokens.tolist() for head in heads):
        raise ValueError("`heads` is empty or of several sets of tokens; takes some of one set")
    columns = heads[0].tokens.tolist()
    if len(words) == len(columns):
        shown = list(words)
    elif len(words) > max(columns):
        shown = [words[column] for column in columns]
    else:
        raise ValueError(f"`words` has {len(words)}; takes {len(columns)}, one a token")
    medians = [float(head.report.logit_margin.median()) for head in heads]
    kept = sorted(sorted(range(len(heads)), key=lambda i: -medians[i])[:most])
    names = [f"{heads[i].layer.removesuffix('.self_attn')[-30:]} {heads[i].head}" for i in kept]
    font = ImageFont.load_default(size=12)
    left = 16 + int(max(font.getlength(name) for name in names))
    cell, row_height, top = 14 + int(max(font.getlength(word) for word in shown)), 18, 30
    image = Image.new("RGB", (left + cell * len(shown) + 150, top + row_height * len(kept) + 10), "white")
    draw = ImageDraw.Draw(image)
    for column, word in enumerate(shown):
        middle = left + cell * (column + 0.5) - font.getlength(word) / 2
        draw.text((middle, 8), word, fill="black", font=font)
    draw.text((left + cell * len(shown) + 10, 8), "margin, of best", fill="black", font=font)
    for line, i in enumerate(kept):
        report, y = heads[i].report, top + row_height * line
        draw.text((8, y + 2), names[line], fill="black" if report.is_selection else "#9aa5b1", font=font)
        for column, share in enumerate(report.shares(len(shown)).tolist()):
            full = (47, 111, 171) if report.is_selection else (154, 165, 177)
            colour = tuple(round(255 - share * (255 - part)) for part in full)
            x = left + cell * column
            draw.rectangle((x, y, x + cell - 2, y + row_height - 2), fill=colour, outline="#e4e7eb")
        text = f"{medians[i]:.2f}"
        if report.efficiency is not None:
            text += f", {100 * report.efficiency:.0f} %"
        draw.text((left + cell * len(shown) + 10, y + 2), text, fill="black", font=font)
    return image
