"""Gradients through a frozen network's calls at the memory of one call."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

__all__ = ["blockwise_checkpointed", "checkpointed", "frozen", "frozen_with_backward"]


@contextmanager
def frozen(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """The modules' parameters need no gradient inside; those that needed one do again afterwards.

    Args:
        modules: networks that gradients pass through. Nothing is touched where gradients are not enabled.

    Raises:
        ValueError: a module checkpoints its own blocks while its parameters require gradients. It would compute
            them again in the backward pass, when its parameters are no longer frozen.
    """
    with _without_gradients(_needing_gradients(modules) if torch.is_grad_enabled() else []):
        yield


@contextmanager
def frozen_with_backward(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """As `frozen`, for a block that the backward pass is part of: modules may then checkpoint their own blocks.

    Args:
        modules: networks that gradients pass through, or any others.
    """
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    with _without_gradients(parameters if torch.is_grad_enabled() else []):
        yield


@contextmanager
def checkpointed(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Every call of these modules is frozen, keeps its inputs only and is computed again in the backward pass.

    One checkpoint holds the whole call, so the memory of a loop is one call's, whatever the number of steps.
    Forward hooks stay outside of it: they run once, and what they keep or return belongs to the graph.

    Args:
        modules: networks that gradients pass through.

    Raises:
        ValueError: as for `frozen`.
    """
    with ExitStack() as stack:
        for module in modules:
            # A module compiled in place calls this instead of `forward`.
            name = "forward" if getattr(module, "_compiled_call_impl", None) is None else "_compiled_call_impl"
            recomputed = _recomputed(getattr(module, name), _needing_gradients([module]))
            stack.enter_context(_replaced(module, name, recomputed))
        yield


@contextmanager
def blockwise_checkpointed(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """These modules' blocks keep their inputs only and are computed again in the backward pass.

    That is Diffusers' own gradient checkpointing, for as long as it lasts: where a module is called once, it saves
    more than `checkpointed` does. A module that has none, or has it on, is left as it is.

    Args:
        modules: models of Diffusers that gradients pass through, their parameters frozen.
    """
    with ExitStack() as stack:
        for module in modules:
            supported = getattr(module, "_supports_gradient_checkpointing", False)
            if supported and not getattr(module, "is_gradient_checkpointing", False):
                module.enable_gradient_checkpointing()
                stack.callback(module.disable_gradient_checkpointing)
        yield


def _recomputed(call: Callable[..., Any], parameters: list[torch.nn.Parameter]) -> Callable[..., Any]:
    def once(*args: Any, **kwargs: Any) -> Any:
        with _without_gradients(parameters):  # the second time, too, which comes when all is restored
            return call(*args, **kwargs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(once, *args, use_reentrant=False, **kwargs)

    return forward


def _needing_gradients(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Parameter]:
    found: list[torch.nn.Parameter] = []
    for module in modules:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if parameters and any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            raise ValueError(
                f"`pipe`'s {type(module).__name__} has gradient checkpointing of its own and parameters that require "
                "gradients; takes one or the other: call its requires_grad_(False)"
            )
        found += parameters
    return found


@contextmanager
def _without_gradients(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = vars(owner).get(name, missing)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if before is missing:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before
