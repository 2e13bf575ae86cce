"""Two statistics of pictures that tell oversaturated guidance from tame: saturation and contrast."""

import torch

__all__ = ["contrast", "saturation"]


def saturation(images: torch.Tensor) -> torch.Tensor:
    """Mean of the HSV saturation channel, S = (max - min) / max over a pixel's colours, 0 for black.

    Args:
        images: (B, 3, H, W), RGB in [0, 1].

    Returns:
        (B,), float32 or wider, in [0, 1]: 0 for a grey picture, 1 for pure colours.

    Raises:
        TypeError: if ``images`` is no floating-point tensor.
        ValueError: if its shape or range is another.

    Example:
        >>> red, grey = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.5, 0.5, 0.5])
        >>> saturation(torch.stack([red, grey]).reshape(2, 3, 1, 1)).tolist()
        [1.0, 0.0]
    """
    images = _checked(images)
    high, low = images.amax(dim=1), images.amin(dim=1)
    spread = torch.where(high > 0, (high - low) / high.clamp_min(torch.finfo(images.dtype).tiny), 0.0)
    return spread.mean(dim=(1, 2))


def contrast(images: torch.Tensor) -> torch.Tensor:
    """Standard deviation over the pixels of luminance, Y = 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601).

    Args:
        images: (B, 3, H, W), RGB in [0, 1].

    Returns:
        (B,), float32 or wider, in [0, 0.5]: 0 for a plain picture, 0.5 for one half black and half white.

    Raises:
        TypeError: if ``images`` is no floating-point tensor.
        ValueError: if its shape or range is another.

    Example:
        >>> half = torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2)
        >>> contrast(half).tolist()
        [0.5]
    """
    images = _checked(images)
    luminance = torch.einsum("bchw,c->bhw", images, images.new_tensor([0.299, 0.587, 0.114]))
    return luminance.flatten(1).std(dim=1, correction=0)


def _checked(images: torch.Tensor) -> torch.Tensor:
    """The images in at least float32: half precision would round a mean of many pixels."""
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        given = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"`images` must be a floating-point tensor, got {given}")
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"`images` must have shape (B, 3, H, W), got {tuple(images.shape)}")
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    low, high = images.amin().item(), images.amax().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"`images` must lie in [0, 1], got values from {low:g} to {high:g}")
    return images
