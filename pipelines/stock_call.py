"""A stock pipeline's `__call__` in three pieces: what it prepares, the noise it draws, the loop it runs.

No code of a stock pipeline is repeated here. The preparation is the stock call itself, stopped where it would
prepare its latents; the noise is the stock `prepare_latents`; the loop is the stock call again, where
`encode_prompt` gives what it gave before. Whatever is put on the pipeline for a call is gone after it, even
if it raised or was interrupted.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .families import Family, stock_class

__all__ = ["Preparation", "borrowed", "draw_latents", "for_rows", "prepare", "run_loop", "stock_arguments"]


@dataclass(frozen=True)
class Preparation:
    """What a stock call computes before its first step.

    Attributes:
        encodings: the values that `encode_prompt` returned, one tuple for each time it was called.
        latents: the arguments that `prepare_latents` got, by name.
    """

    encodings: tuple[tuple[Any, ...], ...]
    latents: dict[str, Any]


class _Reached(BaseException):
    """Leaves the stock call at `prepare_latents`; no handler of ordinary errors may take it for one."""


class _UnitNoise:
    """Stands in for a scheduler where latents are drawn, so that they come out with standard deviation 1."""

    init_noise_sigma = 1.0


def stock_arguments(pipe: Any) -> dict[str, inspect.Parameter]:
    """The parameters of the stock call of `pipe`, by name, without `self`."""
    parameters = dict(inspect.signature(stock_class(pipe).__call__).parameters)
    del parameters["self"]
    return parameters


def _stock_call(pipe: Any) -> Callable[..., Any]:
    """The stock class's own `__call__` without `torch.no_grad`, even where a subclass has another one."""
    return inspect.unwrap(stock_class(pipe).__call__)


@contextmanager
def borrowed(pipe: Any, scheduler: Any) -> Iterator[dict[str, Any]]:
    """Gives the attributes of `pipe` to write to, with `scheduler` in place, and undoes all of it at the end.

    Methods that somebody put on the scheduler meanwhile are left there: they are theirs to remove.
    """
    attributes, state = vars(pipe), vars(scheduler)
    saved_attributes, saved_state = dict(attributes), dict(state)
    attributes["scheduler"] = scheduler
    attributes["_progress_bar_config"] = {"disable": True}
    # Offloading would take the models away that a backward pass still needs; the caller frees them later.
    attributes["maybe_free_model_hooks"] = lambda: None
    try:
        yield attributes
    finally:
        attributes.clear()
        attributes.update(saved_attributes)
        methods = {name: value for name, value in state.items() if inspect.isroutine(value)}
        data = {name: value for name, value in saved_state.items() if not inspect.isroutine(value)}
        state.clear()
        state.update(data | methods)


def prepare(pipe: Any, scheduler: Any, arguments: dict[str, Any]) -> Preparation:
    """Runs the stock call up to its latents: its checks and its text encoders, no denoiser.

    Args:
        pipe: a pipeline of a family in the table.
        scheduler: the scheduler to run it with.
        arguments: keyword arguments of the stock call.

    Returns:
        What the call prepared.

    Raises:
        ValueError: from the stock call's own checks.
    """
    encodings: list[tuple[Any, ...]] = []
    encode_prompt = pipe.encode_prompt
    signature = inspect.signature(pipe.prepare_latents)

    def recording(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        encodings.append(encode_prompt(*args, **kwargs))
        return encodings[-1]

    def reached(*args: Any, **kwargs: Any) -> None:
        raise _Reached(signature.bind(*args, **kwargs).arguments)

    with borrowed(pipe, scheduler) as attributes, torch.no_grad():
        attributes["encode_prompt"] = recording
        attributes["prepare_latents"] = reached
        try:
            _stock_call(pipe)(pipe, **arguments)
        except _Reached as stop:
            return Preparation(tuple(encodings), stop.args[0])
    raise RuntimeError(f"{type(pipe).__name__} never called prepare_latents")


def draw_latents(
    pipe: Any, preparation: Preparation, batch: int, generator: torch.Generator | list[torch.Generator]
) -> torch.Tensor:
    """Standard normal noise from the stock `prepare_latents`: float32, shaped as the stock call takes it."""
    arguments = preparation.latents | {
        "batch_size": batch,
        "dtype": torch.float32,
        "device": pipe._execution_device,
        "generator": generator,
        "latents": None,
    }
    with borrowed(pipe, _UnitNoise()):
        drawn = pipe.prepare_latents(**arguments)
    return drawn[0] if isinstance(drawn, tuple) else drawn


def for_rows(
    family: Family,
    arguments: dict[str, Any],
    encodings: tuple[tuple[Any, ...], ...],
    index: list[int],
    device: torch.device,
) -> tuple[dict[str, Any], tuple[tuple[Any, ...], ...]]:
    """Arguments and encodings of prompts for a batch whose rows have the prompts `index`.

    Args:
        family: the pipeline's entry in the table, which knows what has a row for each prompt.
        arguments: keyword arguments of the stock call.
        encodings: what `encode_prompt` returned, call by call.
        index: for each row of the batch, the number of its prompt.
        device: where the encodings go.

    Returns:
        The same for the batch.
    """
    rows = torch.tensor(index, device=device)

    def select(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device).index_select(0, rows)
        return [value[i] for i in index] if isinstance(value, list) else value

    chosen = {name: select(value) if _is_encoding(name) else value for name, value in arguments.items()}
    for name in ("prompt", "negative_prompt"):
        given = arguments.get(name)
        if given is not None:
            chosen[name] = [given if isinstance(given, str) else given[i] for i in index]
    outputs, shared = family.prompt_outputs, family.shared_outputs
    return chosen, tuple(
        tuple(value if name in shared else select(value) for name, value in zip(outputs, encoding, strict=True))
        for encoding in encodings
    )


def _is_encoding(name: str) -> bool:
    return "_embeds" in name or name.endswith("_mask") or "attention_mask" in name


def run_loop(
    pipe: Any,
    scheduler: Any,
    arguments: dict[str, Any],
    encodings: tuple[tuple[Any, ...], ...],
    *,
    after_steps: bool = False,
) -> torch.Tensor:
    """Runs the stock call to its last latents with encodings made before.

    Args:
        pipe: a pipeline of a family in the table.
        scheduler: the scheduler to run it with.
        arguments: keyword arguments of the stock call, `latents` among them.
        encodings: what `encode_prompt` returns, call by call.
        after_steps: give the latents as the last step left them, where the stock call changes them afterwards.

    Returns:
        The stock call's output of type "latent". Gradients are recorded where they are enabled.
    """
    remaining = iter(encodings)
    last: list[torch.Tensor] = []
    if after_steps:
        arguments = arguments | _watching(arguments, last)
    with borrowed(pipe, scheduler) as attributes:
        attributes["encode_prompt"] = lambda *args, **kwargs: next(remaining)
        output = _stock_call(pipe)(pipe, **arguments, output_type="latent", return_dict=False)[0]
    return last[0] if after_steps else output


def _watching(arguments: dict[str, Any], last: list[torch.Tensor]) -> dict[str, Any]:
    """Arguments that keep the latest latents in `last` besides calling the user's own callback."""
    callback = arguments.get("callback_on_step_end")
    names = arguments.get("callback_on_step_end_tensor_inputs", ["latents"])

    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        result = tensors if callback is None else callback(pipe, step, timestep, tensors)
        last[:] = [result.get("latents", tensors["latents"])]
        return result

    return {
        "callback_on_step_end": step_end,
        "callback_on_step_end_tensor_inputs": list({*names, "latents"}),
    }
