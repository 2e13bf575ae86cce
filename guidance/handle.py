"""What ``attach`` returns: a guider in a pipeline, until it is removed."""

import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

from diffusers.guiders.guider_utils import BaseGuidance

from .base import Guidance

__all__ = ["Attachment"]

_lock = threading.Lock()
_attached: "weakref.WeakSet[Any]" = weakref.WeakSet()  # denoisers, schedulers and guiders in use


class Attachment:
    """A guider in a pipeline: a handle with ``remove()``, and a context manager.

    Args:
        guider: the rule.
    """

    def __init__(self, guider: BaseGuidance):
        self.guider = guider
        self._undo: list[Callable[[], None]] = []
        self._claimed: list[Any] = []

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def attached(self) -> bool:
        """Whether the guider is in the pipeline."""
        return bool(self._claimed)

    def remove(self) -> None:
        """Takes the guider out; the pipeline is as it was. A second call does nothing."""
        if not self._claimed:
            return
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        if isinstance(self.guider, Guidance):
            self.guider.release()
        self._release(self._claimed)

    def _claim(self, items: list[Any]) -> None:
        """Marks parts as in use.

        Raises:
            ValueError: if one of them is already.
        """
        with _lock:
            for item in items:
                if item in _attached:
                    raise ValueError(f"{type(item).__name__} is attached already; remove that attachment first")
            _attached.update(items)
        self._claimed = [*self._claimed, *items]

    def _release(self, items: list[Any]) -> None:
        with _lock:
            for item in items:
                _attached.discard(item)
        self._claimed = [item for item in self._claimed if not any(item is other for other in items)]
