"""Stepping between a pipeline and its denoiser and scheduler, undone without a trace."""

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["InterceptedModule", "intercept_method", "redirect", "unwrapped"]

_ABSENT = object()


def intercept_method(owner: object, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Replaces one object's method by ``wrapper(original, *args, **kwargs)``; returns what undoes it.

    The replacement keeps the original's signature, which pipelines inspect.
    """
    own = vars(owner).get(name, _ABSENT)
    original = getattr(owner, name)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, replacement)
    return lambda: _put_back(owner, name, replacement, own)


def _put_back(owner: object, name: str, replacement: Any, own: Any) -> None:
    if vars(owner).get(name) is not replacement:
        return  # replaced by somebody else since: theirs to put back
    if own is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, own)


def redirect(module: torch.nn.Module, target: Callable[..., Any]) -> Callable[[], None]:
    """Calls of a module, compiled in place or not, go to ``target``; returns what undoes it."""
    name = "forward" if getattr(module, "_compiled_call_impl", None) is None else "_compiled_call_impl"
    return intercept_method(module, name, lambda _, *args, **kwargs: target(*args, **kwargs))


class InterceptedModule:
    """Calls ``before`` on a module's inputs and ``after`` on its output, until ``undo``.

    Hooks stay outside of whatever replaced ``module.forward`` (offloading, checkpoints). A module compiled in
    place would trace its hooks, so there the compiled call itself is wrapped.

    Args:
        module: the module, or ``torch.compile`` of one.
        before: ``(self, args, kwargs) -> (args, kwargs)``.
        after: ``(self, output) -> output``.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        before: Callable[["InterceptedModule", tuple, dict], tuple[tuple, dict]],
        after: Callable[["InterceptedModule", Any], Any],
    ):
        self.module = module
        self._next_output: Any = _ABSENT
        self._cancel: Callable[[], None] | None = None
        compiled = getattr(module, "_compiled_call_impl", None)
        self._compiled = compiled is not None
        if compiled is None:
            handles = (
                module.register_forward_pre_hook(lambda _, args, kwargs: before(self, args, kwargs), with_kwargs=True),
                module.register_forward_hook(lambda _, args, output: after(self, output)),
            )
            self._undo = [handle.remove for handle in handles]
            return

        def around(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = before(self, args, kwargs)
            if self._next_output is not _ABSENT:
                output, self._next_output = self._next_output, _ABSENT
            else:
                output = compiled(*args, **kwargs)
            return after(self, output)

        module._compiled_call_impl = around
        self._undo = [lambda: _put_back(module, "_compiled_call_impl", around, compiled)]

    def skip_next(self, output: Any) -> None:
        """The module's next call returns ``output`` and computes nothing; ``run_next`` takes that back."""
        if self._compiled:
            self._next_output = output
            return

        def stub(original: Any, *args: Any, **kwargs: Any) -> Any:
            self.run_next()
            return output

        self.run_next()
        self._cancel = intercept_method(self.module, "forward", stub)

    def run_next(self) -> None:
        """The module's next call computes as usual."""
        self._next_output = _ABSENT
        if self._cancel is not None:
            self._cancel()
            self._cancel = None

    def sees(self, module: torch.nn.Module) -> bool:
        """Whether calls of ``module`` come by here: it is this one, and wasn't compiled in place since."""
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        return module is self.module and compiled == self._compiled

    def undo(self) -> None:
        """The module is as it was."""
        self.run_next()
        for undo in self._undo:
            undo()
        self._undo = []


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside ``torch.compile(module)``."""
    return getattr(module, "_orig_mod", module)
