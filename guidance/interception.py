"""Stepping between a pipeline and its denoiser and scheduler, undone without a trace."""

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["intercept_method", "intercept_module", "unwrapped"]

Before = Callable[[tuple, dict], tuple[tuple, dict]]
After = Callable[[Any], Any]


def intercept_method(owner: object, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Replaces one object's method by ``wrapper(original, *args, **kwargs)``; returns the function that
    undoes it.

    The replacement keeps the original's signature, which pipelines inspect.
    """
    own = vars(owner).get(name)
    original = getattr(owner, name)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, replacement)

    def undo() -> None:
        if vars(owner).get(name) is not replacement:
            return  # somebody replaced it since; what they keep calls us, and we are passive from now on
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)

    return undo


def intercept_module(module: torch.nn.Module, before: Before, after: After) -> Callable[[], None]:
    """Calls ``before`` on a module's inputs and ``after`` on its output; returns the function that undoes it.

    Hooks stay outside of whatever replaced ``module.forward`` (offloading, checkpoints). A module compiled in
    place would trace its hooks, so there the compiled call itself is wrapped.
    """
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is not None:

        def around(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = before(args, kwargs)
            return after(compiled(*args, **kwargs))

        module._compiled_call_impl = around

        def undo() -> None:
            if module._compiled_call_impl is around:
                module._compiled_call_impl = compiled

        return undo
    handles = (
        module.register_forward_pre_hook(lambda _, args, kwargs: before(args, kwargs), with_kwargs=True),
        module.register_forward_hook(lambda _, args, output: after(output)),
    )

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside ``torch.compile(module)``."""
    return getattr(module, "_orig_mod", module)
