"""How near a picture's colours are to a palette, wherever they lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from trimtab.geometry import sliced_wasserstein

from .base import RewardModel

__all__ = ["PaletteReward"]


class PaletteReward(RewardModel):
    """Minus the sliced Wasserstein distance SW_2 between a picture's colours and a palette's.

    Colours are points of the RGB cube, so the value is at most 0, reached where a picture has the palette's colours
    in its proportions. It ignores the prompt. Bonneel et al., "Sliced and Radon Wasserstein Barycenters of Measures"
    (2015).

    Args:
        palette: colours, such as ["#ffd1dc", "white", (0.1, 0.2, 0.9)], or a picture that has them: PIL, or a tensor
            (3, H, W) in [0, 1].
        weights: of the colours, >= 0 and not all 0; None weighs them alike. Not with a picture.
        size: pictures are averaged to `size` x `size` pixels first.
        num_projections: directions, the same for all pictures.

    Raises:
        TypeError: if `palette` is nothing of the kind.
        ValueError: for a colour that is none, or weights that don't fit.

    Example:
        >>> reward = PaletteReward(["red", "white"])
        >>> red, pink = torch.tensor([1.0, 0, 0]), torch.tensor([1.0, 0.7, 0.7])
        >>> pictures = torch.stack([colour.view(3, 1, 1).expand(3, 8, 8).clone() for colour in (red, pink)])
        >>> pictures[0, :, :4] = 1.0  # half white
        >>> values = reward(pictures, "")
        >>> round(abs(values[0].item()), 3), bool(values[1] < -0.1)
        (0.0, True)
    """

    name = "palette"

    def __init__(
        self, palette: Any, *, weights: Sequence[float] | None = None, size: int = 32, num_projections: int = 64
    ) -> None:
        super().__init__()
        self.size = size
        is_picture = isinstance(palette, (Image.Image, Tensor))
        colours = self._colours(_picture(palette))[0] if is_picture else _colour_list(palette)
        if weights is None:
            weights = [1.0] * len(colours)
        elif is_picture:
            raise ValueError("`weights` are those of a list of colours; a picture has its own")
        if len(weights) != len(colours) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"`weights` is {list(weights)}; takes {len(colours)} numbers >= 0, not all 0")
        generator = torch.Generator().manual_seed(0)
        directions = normalize(torch.randn(num_projections, 3, generator=generator), dim=1)
        self.register_buffer("palette", colours)
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32))
        self.register_buffer("directions", directions)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,); see the class."""
        count = len(images)
        distance = sliced_wasserstein(
            self._colours(images.float()),
            self.palette.float().expand(count, -1, -1),
            projections=self.directions.float(),
            y_weights=self.weights.float().expand(count, -1),
            root=True,
        )
        return -distance

    def _colours(self, images: Tensor) -> Tensor:
        """The pixels of pictures (B, 3, H, W), made smaller by averaging, as points (B, N, 3)."""
        height, width = (min(self.size, side) for side in images.shape[2:])
        return interpolate(images, (height, width), mode="area").flatten(2).transpose(1, 2)


def _picture(palette: Image.Image | Tensor) -> Tensor:
    if isinstance(palette, Image.Image):
        palette = torch.from_numpy(np.asarray(palette.convert("RGB"), np.float32) / 255.0).movedim(2, 0)
    if palette.ndim != 3 or palette.shape[0] != 3 or not palette.is_floating_point():
        raise ValueError(f"`palette` has shape {tuple(palette.shape)}; takes a picture (3, H, W) in [0, 1]")
    return palette[None].float()


def _colour_list(palette: Any) -> Tensor:
    if isinstance(palette, str) or not isinstance(palette, Sequence) or not palette:
        raise TypeError(f"`palette` is {palette!r}; takes a list of colours or a picture")
    rows = []
    for colour in palette:
        if isinstance(colour, str):
            try:
                rows.append([part / 255 for part in ImageColor.getrgb(colour)[:3]])
            except ValueError:
                raise ValueError(f"`palette` has {colour!r}; takes colours such as '#ffd1dc' or 'white'") from None
        elif len(colour) == 3 and all(0 <= part <= 1 for part in colour):
            rows.append([float(part) for part in colour])
        else:
            raise ValueError(f"`palette` has {colour!r}; takes three numbers in [0, 1]")
    return torch.tensor(rows)
