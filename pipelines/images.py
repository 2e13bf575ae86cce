"""Pictures from files, PIL and arrays as one batch of tensors, at a size that the model takes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

__all__ = ["fit_images", "fitted_size", "load_image", "load_images", "load_masks", "size_of_batch"]

MAX_ASPECT = 8.0
"""The longest side over the shortest that a picture may have where its own proportions are kept."""


def load_image(source: Any, *, name: str = "image") -> Image.Image:
    """One picture in upright RGB.

    A picture is turned as its EXIF orientation says, transparency is laid on white, greyscale, palette, 16-bit and
    CMYK pictures become RGB, and of an animation the first frame counts.

    Args:
        source: a path, a PIL image, an array (H, W), (H, W, 3) or (H, W, 4) of uint8 or of floats in [0, 1], or a
            tensor (3, H, W) or (1, H, W) of floats in [0, 1].
        name: of the caller's argument, for messages.

    Returns:
        An RGB image of the source's own size.

    Raises:
        TypeError: `source` is none of these.
        ValueError: it is no picture that can be read, is empty, or has values out of range.

    Example:
        >>> load_image(Image.new("LA", (4, 2), (0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    if isinstance(source, (str, Path)):
        return _from_file(Path(source).expanduser(), name)
    if isinstance(source, Image.Image):
        return _upright_rgb(source, name)
    if isinstance(source, torch.Tensor):
        if source.ndim != 3 or source.shape[0] not in (1, 3) or not source.is_floating_point():
            raise ValueError(f"`{name}` is a {_described(source)} tensor; takes floating (3, H, W) or (1, H, W)")
        source = source.detach().float().cpu().movedim(0, -1).numpy()
        source = source[..., 0] if source.shape[-1] == 1 else source
    if isinstance(source, np.ndarray):
        return _upright_rgb(_from_array(source, name), name)
    raise TypeError(f"`{name}` is a {type(source).__name__}; takes a path, a PIL image, an array or a tensor")


def fitted_size(size: tuple[int, int], area: int, multiple: int) -> tuple[int, int]:
    """The size at which a picture of its own proportions is given to a model.

    Args:
        size: (width, height) of the picture.
        area: pixels that the model's own pictures have.
        multiple: of which both sides must be.

    Returns:
        (width, height): proportions as near to the picture's as multiples allow, about `area` pixels.

    Raises:
        ValueError: one side is more than `MAX_ASPECT` times the other.

    Example:
        >>> fitted_size((4000, 3000), 1024 * 1024, 16)
        (1184, 880)
    """
    width, height = size
    aspect = width / height
    if max(aspect, 1 / aspect) > MAX_ASPECT:
        raise ValueError(
            f"`image` is {width} x {height} pixels; takes sides of at most {MAX_ASPECT:g} to 1: crop it, or pass "
            "`height` and `width`, to which it is cropped in its middle"
        )
    ideal = math.sqrt(area * aspect), math.sqrt(area / aspect)
    return tuple(max(multiple, round(side / multiple) * multiple) for side in ideal)


def load_images(sources: Any, *, name: str = "image") -> list[Image.Image]:
    """Pictures in upright RGB, each of its own size.

    Args:
        sources: what `load_image` takes, or a list of them, or a tensor (B, 3, H, W) in [0, 1].
        name: of the caller's argument, for messages.

    Returns:
        The pictures.

    Raises:
        TypeError: a source of another type.
        ValueError: an unreadable picture, or none.
    """
    if isinstance(sources, torch.Tensor) and sources.ndim == 4:
        sources = list(sources)
    images = [load_image(item, name=name) for item in (sources if isinstance(sources, (list, tuple)) else [sources])]
    if not images:
        raise ValueError(f"`{name}` is an empty list; takes a picture or a list with at least one")
    return images


def size_of_batch(
    images: Sequence[Image.Image], area: int, multiple: int, *, height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """The size of a batch of pictures as the model takes them.

    The rule: a picture keeps its proportions and is scaled, up or down, to the number of pixels that the model is made
    for (`fitted_size`); with `height` and `width` it gets exactly that size.

    Args:
        images: the pictures.
        area: pixels that the model's own pictures have.
        multiple: of which both sides must be.
        height: of the result in pixels, together with `width`; None is by the rule.
        width: of the result in pixels.

    Returns:
        (width, height)

    Raises:
        ValueError: the rule gives pictures of a batch different sizes, or is broken by a picture's proportions.
    """
    if height is not None and width is not None:
        return width, height
    sizes = {fitted_size(image.size, area, multiple) for image in images}
    if len(sizes) > 1:
        found = ", ".join(f"{w} x {h}" for w, h in sorted(sizes))
        raise ValueError(f"`image` has pictures of different proportions ({found}); pass `height` and `width`")
    return sizes.pop()


def fit_images(
    images: Sequence[Image.Image], size: tuple[int, int], method: Image.Resampling = Image.Resampling.LANCZOS
) -> torch.Tensor:
    """Pictures scaled to cover a size; what sticks out is cut off evenly at both ends.

    Args:
        images: the pictures.
        size: (width, height)
        method: of resampling.

    Returns:
        (B, 3, height, width) float32 in [0, 1].
    """
    return torch.stack([_tensor(_covering(image, size, method)) for image in images])


def load_masks(sources: Any, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Masks of what may change in pictures, one each.

    Args:
        sources: what `load_image` takes, white where the picture may change; or a list, one a picture.
        images: the pictures, as `load_images` gives them.

    Returns:
        RGB images, one a picture.

    Raises:
        TypeError: a source of another type.
        ValueError: another number of masks than pictures, a mask that is black everywhere, or one of other
            proportions than its picture, so that it would not lie on it.
    """
    masks = load_images(sources, name="mask_image")
    if len(masks) not in (1, len(images)):
        raise ValueError(f"`mask_image` has {len(masks)} masks for {len(images)} pictures; takes one, or one a picture")
    masks = masks * (len(images) // len(masks))
    for mask, image in zip(masks, images, strict=True):
        if mask.getbbox() is None:
            raise ValueError("`mask_image` is black everywhere; takes white where the picture may change")
        (width, height), (mask_width, mask_height) = image.size, mask.size
        if abs(mask_width * height - width * mask_height) > max(width * mask_height, mask_width * height) / 50:
            raise ValueError(
                f"`mask_image` is {mask_width} x {mask_height} pixels for a picture of {width} x {height}; takes one "
                "of the picture's proportions"
            )
    return masks


def _from_file(path: Path, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels are an error
            with Image.open(path) as image:
                image.draft("RGB", (4096, 4096))  # a large JPEG is decoded at a half, a quarter or an eighth
                return _upright_rgb(image, name)
    except Image.DecompressionBombError as error:
        raise ValueError(f"`{name}` {path} is too large: {error}") from None
    except FileNotFoundError:
        raise ValueError(f"`{name}` {path} does not exist; takes a picture's file") from None
    except Exception as error:  # decoders of broken files raise nearly anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"`{name}` {path} is no picture that can be read: {reason}") from None


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"`{name}` is a {_described(array)} array; takes (H, W), (H, W, 3) or (H, W, 4)")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"`{name}` has dtype {array.dtype}; takes uint8, or floats in [0, 1]")
        if not bool(((array >= 0) & (array <= 1)).all()):
            raise ValueError(f"`{name}` has a value that is not in [0, 1]")
        array = (array * 255).round().astype(np.uint8)
    return Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"`{name}` is {image.size[0]} x {image.size[1]} pixels; takes a picture with pixels")
    try:
        image = ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, TypeError, KeyError):  # a broken EXIF block tells no orientation
        image.load()
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float64)
        top = 65535.0 if image.mode != "F" else max(1.0, float(values.max()))
        image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def _covering(image: Image.Image, size: tuple[int, int], method: Image.Resampling) -> Image.Image:
    """The picture scaled to cover `size` and cut to it in its middle."""
    if image.size == size:
        return image
    return ImageOps.fit(image, size, method=method)


def _tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}"
