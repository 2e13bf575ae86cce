"""The one model in memory: loaded when first used, used by one run at a time."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from trimtab.commands.errors import UsageError

from .gpu import on_zero_gpu
from .limits import BUNDLED

__all__ = ["LoadedModel", "SharedModel", "place"]

_HEADROOM = 1.3
"""Activations and the allocator's waste beside the weights, as a factor of their size."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        name: by which it was asked for.
        pipe: the stock pipeline, on its device.
        height: of the model's own pictures in pixels.
        width: of the model's own pictures in pixels.
        multiple: of which both sides of a picture must be.
        placement: "whole", "offloaded" (a component at a time) or "sequential" (a layer at a time).
    """

    name: str
    pipe: Any
    height: int
    width: int
    multiple: int
    placement: str

    def unknown_words(self, *prompts: str | None) -> str:
        """A note that names the words of prompts that the model does not know; empty if there are none."""
        from trimtab.pipelines.vocabulary import unknown_words

        words = unknown_words(self.pipe, [prompt for prompt in prompts if prompt])
        return f"The model does not know: {', '.join(words)}." if words else ""

    def size_within(self, largest: int) -> tuple[int, int]:
        """(height, width) of the model's own pictures, scaled down where a side is over the limit."""
        scale = min(1.0, largest / max(self.height, self.width))
        sides = (max(self.multiple, int(side * scale) // self.multiple * self.multiple) for side in self._size)
        return tuple(sides) if scale < 1 else self._size

    @property
    def _size(self) -> tuple[int, int]:
        return self.height, self.width


class SharedModel:
    """Holds at most one model.

    Args:
        load: makes a model from its name; None is that of pictures, a :class:`LoadedModel`.

    Attributes:
        loaded: the model in memory, or None.
        loads: how many times one was loaded.
    """

    def __init__(self, load: Callable[[str], Any] | None = None) -> None:
        self.loaded: Any = None
        self.loads = 0
        self._load = load or _load
        self._name = ""
        self._lock = threading.Lock()

    @contextmanager
    def use(self, name: str, note: Callable[[str], None], check: Callable[[], None]) -> Iterator[Any]:
        """The model for one run; another run waits until this one is done with it.

        Args:
            name: a folder, a Hub id, or "bundled".
            note: is told what goes on.
            check: raises when the run is to end; called while waiting.

        Raises:
            UsageError: if the model cannot be loaded.
        """
        while not self._lock.acquire(timeout=0.1):
            check()
        try:
            if self.loaded is None or self._name != name:
                note(f"Loading the model ({'the bundled one' if name == BUNDLED else name}); this happens once.")
                self.loaded = None
                gc.collect()
                _empty_cache()
                self.loaded, self._name = self._load(name), name
                self.loads += 1
            yield self.loaded
        finally:
            self._lock.release()


def place(pipe: Any, free: int, sizes: list[int]) -> str:
    """How a pipeline is put on an accelerator: whole if it fits, else by offloading.

    Args:
        pipe: a pipeline on the CPU.
        free: bytes of the accelerator's memory that are free.
        sizes: bytes of the weights of each component.

    Returns:
        "whole", "offloaded" or "sequential".
    """
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    if sum(sizes) * _HEADROOM <= free:
        pipe.to(device)
        return "whole"
    if max(sizes) * _HEADROOM <= free:
        pipe.enable_model_cpu_offload(device=device)
        return "offloaded"
    pipe.enable_sequential_cpu_offload(device=device)
    return "sequential"


def _load(name: str) -> LoadedModel:
    import torch

    from trimtab.commands.model import check_model, load_pipeline

    try:
        model = check_model(None if name == BUNDLED else name)
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None and accelerator.type == "cuda":
            pipe = load_pipeline(model, "bfloat16", "cpu")
            if on_zero_gpu():
                return _lent(name, pipe)
            free, _ = torch.cuda.mem_get_info()
            placement = place(pipe, free, _sizes(pipe))
        else:
            pipe, placement = load_pipeline(model, "auto", "auto"), "whole"
    except UsageError as error:
        raise UsageError(f"The model {name} cannot be used: {error}") from error
    return _described(name, pipe, placement)


def _lent(name: str, pipe: Any) -> LoadedModel:
    """On ZeroGPU, where there is no card yet: looked at on the CPU, then noted to be moved whole with each loan."""
    loaded = _described(name, pipe, "whole")
    return replace(loaded, pipe=pipe.to("cuda"))


def _described(name: str, pipe: Any, placement: str) -> LoadedModel:
    from trimtab.pipelines import GenerationMap
    from trimtab.pipelines.families import size_multiple

    pipe.set_progress_bar_config(disable=True)
    own = GenerationMap(pipe, "", num_inference_steps=1, output="latent")
    return LoadedModel(name, pipe, own.height, own.width, size_multiple(pipe), placement)


def _sizes(pipe: Any) -> list[int]:
    import torch

    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [sum(value.numel() * value.element_size() for value in part.state_dict().values()) for part in parts]


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
