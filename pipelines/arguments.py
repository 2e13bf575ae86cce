"""Checks of a generation map's arguments: each error names the argument, what it got and what it takes."""

from collections.abc import Sequence
from typing import Any

import torch

from trimtab.optim.checks import checked_count, checked_number

__all__ = [
    "check_floating",
    "check_images",
    "check_latents",
    "checked_count",
    "checked_generators",
    "checked_negative",
    "checked_scale",
    "checked_size",
    "noise_states",
    "number_of_prompts",
    "prompt_rows",
]


def checked_scale(name: str, value: Any) -> float:
    """A finite number that isn't negative."""
    return checked_number(name, value, least=0)


def checked_size(name: str, value: Any, multiple: int) -> int:
    """A positive multiple of `multiple` pixels."""
    size = checked_count(name, value)
    if size % multiple:
        raise ValueError(f"`{name}` is {size}; takes a multiple of {multiple} for this model")
    return size


def number_of_prompts(prompt: Any, arguments: dict[str, Any]) -> int:
    """How many prompts, or encodings of prompts, a call is given."""
    given = arguments.get("prompt_embeds")
    if prompt is None:
        if given is None:
            raise ValueError("`prompt` is None; takes a string or a list of strings, or else pass `prompt_embeds`")
        return len(given)
    if given is not None:
        raise ValueError("`prompt` and `prompt_embeds` are both given; takes one of them")
    return _prompts("prompt", prompt)


def checked_negative(negative_prompt: Any, prompt: Any, prompts: int) -> str | list[str]:
    """A string for one prompt, a list for a list of prompts: pipelines want the two to be of one type."""
    count = _prompts("negative_prompt", negative_prompt)
    texts = [negative_prompt] * prompts if isinstance(negative_prompt, str) else list(negative_prompt)
    if len(texts) != prompts:
        raise ValueError(f"`negative_prompt` has {count} strings; takes one, or {prompts} for as many prompts")
    return texts[0] if isinstance(prompt, str) else texts


def _prompts(name: str, value: Any) -> int:
    if isinstance(value, str):
        return 1
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"`{name}` is {value!r}; takes a string or a list of strings")
    if not value:
        raise ValueError(f"`{name}` is an empty list; takes a string or a list with at least one")
    return len(value)


def noise_states(
    generator: torch.Generator | Sequence[torch.Generator] | None, prompts: int
) -> list[tuple[torch.device, torch.Tensor]]:
    """Device and present state of one generator for all prompts or of one for each."""
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    given = checked_generators(generator, prompts)
    generators = [given] if isinstance(given, torch.Generator) else given
    return [(item.device, item.get_state()) for item in generators]


def checked_generators(generator: Any, count: int) -> torch.Generator | list[torch.Generator]:
    """One generator, or a list of so many."""
    if isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, Sequence) or not all(isinstance(g, torch.Generator) for g in generator):
        raise TypeError(f"`generator` is {generator!r}; takes a torch.Generator or a list of them")
    if len(generator) != count:
        raise ValueError(f"`generator` has {len(generator)} generators; takes one or a list of {count}")
    return list(generator)


def check_floating(name: str, value: Any) -> None:
    """A tensor of a floating dtype."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` is a {type(value).__name__}; takes a floating tensor")
    if not value.is_floating_point():
        raise TypeError(f"`{name}` has dtype {value.dtype}; takes a floating one")


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """A non-empty batch of finite samples of this shape."""
    check_floating("latents", latents)
    _check_batch("latents", latents, shape)
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("`latents` has a value that is not finite")


def check_images(images: Any, shape: tuple[int, ...]) -> None:
    """A non-empty batch of pictures of this shape with values in [0, 1]."""
    check_floating("images", images)
    _check_batch("images", images, shape)
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError("`images` has a value that is not in [0, 1]")


def _check_batch(name: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
    if value.ndim != len(shape) + 1 or tuple(value.shape[1:]) != shape or not len(value):
        takes = ", ".join(map(str, ("B", *shape)))
        raise ValueError(f"`{name}` has shape {tuple(value.shape)}; takes ({takes}) with B >= 1")


def prompt_rows(prompt_index: Sequence[int] | None, batch: int, prompts: int) -> list[int]:
    """Which prompt each row of a batch has."""
    if prompt_index is None:
        if prompts not in (1, batch):
            raise ValueError(f"`latents` has {batch} rows for {prompts} prompts; takes {prompts}, or `prompt_index`")
        return [0] * batch if prompts == 1 else list(range(batch))
    index = [int(i) for i in prompt_index]
    if len(index) != batch or not all(0 <= i < prompts for i in index):
        raise ValueError(f"`prompt_index` is {index}; takes {batch} of the numbers 0 to {prompts - 1}, one a row")
    return index
