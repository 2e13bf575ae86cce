"""Pictures as a vision model takes them, differentiably: resized, cropped, normalized, without torchvision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["CLIP_MEAN", "CLIP_STD", "Preprocessing", "center_crop", "resize"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MODES = {0: "nearest-exact", 1: "bicubic", 2: "bilinear", 3: "bicubic"}  # PIL's codes; torch has no Lanczos


def resize(images: Tensor, size: int | tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Resizes pictures with antialiasing, as PIL does; values may overshoot [0, 1] at edges and are left there.

    Args:
        images: (B, C, H, W), floating.
        size: (height, width), or the length of the shorter side; the longer is then rounded down.
        mode: of `torch.nn.functional.interpolate`.

    Returns:
        (B, C, *size), differentiable in `images`.

    Example:
        >>> resize(torch.zeros(1, 3, 300, 500), 224).shape[2:]
        torch.Size([224, 373])
    """
    height, width = images.shape[-2:]
    if isinstance(size, int):
        short = min(height, width)
        size = (size, int(size * width / short)) if height == short else (int(size * height / short), size)
    if size == (height, width):
        return images
    if mode == "nearest-exact":
        return functional.interpolate(images, size, mode=mode)
    return functional.interpolate(images, size, mode=mode, antialias=True)


def center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of pictures (B, C, H, W), the smaller rest at the top and left; black where they are smaller.

    Example:
        >>> center_crop(torch.arange(5.0).reshape(1, 1, 1, 5), (1, 2)).flatten().tolist()
        [1.0, 2.0]
    """
    (height, width), (high, wide) = images.shape[-2:], size
    missing = max(0, high - height), max(0, wide - width)
    if any(missing):
        top, left = missing[0] // 2, missing[1] // 2
        images = functional.pad(images, (left, missing[1] - left, top, missing[0] - top))
        height, width = images.shape[-2:]
    top, left = (height - high) // 2, (width - wide) // 2
    return images[..., top : top + high, left : left + wide]


@dataclass(frozen=True)
class Preprocessing:
    """From pictures in [0, 1] to a vision model's input.

    Attributes:
        size: (height, width), the length of the shorter side, or None to leave it.
        crop: (height, width) of the middle that is kept, or None for all of it.
        mean: subtracted from each channel.
        std: divides each channel afterwards.
        mode: of `torch.nn.functional.interpolate`.
    """

    size: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: str = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], any floating dtype, to float32 (B, 3, *crop)."""
        x = images.float()
        if self.size is not None:
            x = resize(x, self.size, self.mode)
        if self.crop is not None:
            x = center_crop(x, self.crop)
        mean, std = (torch.tensor(value, device=x.device).view(1, -1, 1, 1) for value in (self.mean, self.std))
        return (x - mean) / std

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Preprocessing:
        """Reads what a `preprocessor_config.json` states, with transformers' meaning of its fields.

        Raises:
            ValueError: for a size that is none of `shortest_edge` and `height` with `width`.
        """
        size, crop = config.get("size"), config.get("crop_size")
        return cls(
            size=_size(size) if config.get("do_resize", True) and size is not None else None,
            crop=_square(crop) if config.get("do_center_crop", False) and crop is not None else None,
            mean=tuple(config.get("image_mean") or CLIP_MEAN) if config.get("do_normalize", True) else (0.0,) * 3,
            std=tuple(config.get("image_std") or CLIP_STD) if config.get("do_normalize", True) else (1.0,) * 3,
            mode=_MODES.get(config.get("resample", 3), "bicubic"),
        )


def read_preprocessing(source: str) -> dict[str, Any]:
    """The fields of a model's `preprocessor_config.json`, from a folder or the Hub."""
    from transformers.image_processing_base import ImageProcessingMixin

    config, _ = ImageProcessingMixin.get_image_processor_dict(source)
    return config


def _size(value: Any) -> int | tuple[int, int]:
    if isinstance(value, int):
        return value
    if "shortest_edge" in value:
        return int(value["shortest_edge"])
    return _square(value)


def _square(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if not {"height", "width"} <= set(value):
        raise ValueError(f"`size` is {value}; takes shortest_edge, or height and width")
    return int(value["height"]), int(value["width"])
