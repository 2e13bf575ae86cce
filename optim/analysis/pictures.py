"""Drawings of spectra."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from .hessian import SpectrumResult

__all__ = ["spectrum_picture"]

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
