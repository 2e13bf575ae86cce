"""Rows of a denoiser's inputs and outputs: which are computed, and what goes back to the pipeline."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "batch_rows",
    "halves_equal",
    "join",
    "output_value",
    "replace_output",
    "split",
    "take_rows",
    "token_grid",
]


def _leading(args: tuple, kwargs: dict) -> Any:
    """The noisy latents among a denoiser's inputs: a tensor, or a list with one tensor for each picture."""
    if args:
        return args[0]
    return next(kwargs[name] for name in ("hidden_states", "sample", "x") if name in kwargs)


def batch_rows(args: tuple, kwargs: dict) -> int:
    """How many pictures a denoiser is called on."""
    return len(_leading(args, kwargs))


def halves_equal(args: tuple, kwargs: dict) -> bool:
    """Whether the noisy latents are the same ones twice. Waits for the device."""
    latents = _leading(args, kwargs)
    half = len(latents) // 2
    if len(latents) % 2:
        return False
    if isinstance(latents, torch.Tensor):
        return torch.equal(latents[:half], latents[half:])
    return all(torch.equal(a, b) for a, b in zip(latents[:half], latents[half:], strict=True))


def take_rows(args: tuple, kwargs: dict, blocks: list[slice], unbatched: tuple[str, ...] = ()) -> tuple[tuple, dict]:
    """The inputs with these blocks of rows, in this order; a block may come twice.

    A tensor is batched if its first dimension has the batch's length, at any depth of lists, tuples and dicts.
    Where the latents come as a list, lists of that length are batched themselves.

    Args:
        args: positional inputs.
        kwargs: inputs by name.
        blocks: slices of rows.
        unbatched: names of inputs that stay as they are.
    """
    latents = _leading(args, kwargs)
    rows, listed = len(latents), isinstance(latents, list)

    def pick(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if not value.ndim or value.shape[0] != rows:
                return value
            return value[blocks[0]] if len(blocks) == 1 else torch.cat([value[block] for block in blocks])
        if isinstance(value, list) and listed and len(value) == rows:
            return [item for block in blocks for item in value[block]]
        if isinstance(value, (list, tuple)):
            return type(value)(pick(item) for item in value)
        if isinstance(value, dict):
            return {name: pick(item) for name, item in value.items()}
        return value

    picked = {name: value if name in unbatched else pick(value) for name, value in kwargs.items()}
    return tuple(pick(value) for value in args), picked


def split(value: Any, blocks: int) -> list[Any]:
    """Equal blocks of rows of an output, a tensor or a list of tensors."""
    size = len(value) // blocks
    return [value[i * size : (i + 1) * size] for i in range(blocks)]


def join(blocks: list[Any]) -> Any:
    """The inverse of ``split``."""
    if len(blocks) == 1:
        return blocks[0]
    if isinstance(blocks[0], torch.Tensor):
        return torch.cat(blocks)
    return [item for block in blocks for item in block]


def output_value(output: Any) -> Any:
    """The prediction in what a denoiser returned."""
    return output[0] if isinstance(output, tuple) else output.sample


def replace_output(output: Any, value: Any) -> Any:
    """What a denoiser returned, with another prediction in it."""
    if isinstance(output, tuple):
        return (value, *output[1:])
    make: Callable[..., Any] = type(output)
    return make(**{**output, "sample": value})


def token_grid(args: tuple, kwargs: dict) -> tuple[int, int] | None:
    """Rows and columns of a picture's tokens, from what a denoiser is told of their places; None if it takes none.

    Args:
        args: positional inputs.
        kwargs: inputs by name: ``img_shapes`` (Qwen-Image), ``height`` and ``width`` (LTX), or ``img_ids``, whose
            first columns are picture, row and column (FLUX). The last are read from the device.

    Raises:
        ValueError: if there is none of them.
    """
    latents = _leading(args, kwargs)
    if not isinstance(latents, torch.Tensor) or latents.ndim != 3:
        return None
    if "img_shapes" in kwargs:
        shape = kwargs["img_shapes"][0]
        rows, columns = (shape[0] if isinstance(shape, list) else shape)[-2:]
    elif "height" in kwargs and "width" in kwargs:
        rows, columns = kwargs["height"], kwargs["width"]
    elif "img_ids" in kwargs:
        ids = kwargs["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids
        ids = ids[ids[:, 0] == ids[0, 0]]  # reference pictures have other numbers
        rows, columns = (ids[:, 1:3].amax(0) + 1).tolist()
    else:
        raise ValueError(f"tokens can't be put in their places by {', '.join(kwargs)}")
    return int(rows), int(columns)
