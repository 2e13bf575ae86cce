"""Gradients through a frozen network's calls at the memory of one call."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpointed", "frozen"]


@contextmanager
def frozen(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Parameters need no gradient inside; those that needed one do again afterwards."""
    needed = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)


@contextmanager
def checkpointed(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Every call of these modules keeps its inputs only and is computed again in the backward pass.

    One checkpoint holds the whole call, so the memory of a loop is one call's, whatever the number of steps.
    Forward hooks stay outside of it: they run once, and what they keep or return belongs to the graph.
    """
    with ExitStack() as stack:
        for module in modules:
            # A module compiled in place calls this instead of `forward`.
            name = (
                "forward" if getattr(module, "_compiled_call_impl", None) is None else "_compiled_call_impl"
            )
            stack.enter_context(_replaced(module, name, _recomputed(module, getattr(module, name))))
        yield


def _recomputed(module: torch.nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def once(*args: Any, **kwargs: Any) -> Any:
        with frozen(parameters):  # at the second computation, too, which comes when all is restored
            return call(*args, **kwargs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(once, *args, use_reentrant=False, **kwargs)

    return forward


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
