"""What runs import, imported in the background once somebody looks at the page: the page itself needs none of it."""

import contextlib
import importlib
import threading

from .gpu import on_zero_gpu

__all__ = ["import_in_background", "wait_for_import"]

_LIBRARIES = ("trimtab.pipelines", "trimtab.guidance", "trimtab.rewards", "trimtab.geometry")
_lock = threading.Lock()
_thread: threading.Thread | None = None


def import_in_background() -> None:
    """Starts the imports, once; not on ZeroGPU, where they are there and a fork must not meet a held lock."""
    global _thread
    with _lock:
        if _thread is None and not on_zero_gpu():
            _thread = threading.Thread(target=_import, daemon=True, name="trimtab-libraries")
            _thread.start()


def wait_for_import() -> None:
    """Returns when imports that were started are done; at once if none were."""
    if _thread is not None:
        _thread.join()


def _import() -> None:
    for name in _LIBRARIES:
        with contextlib.suppress(Exception):  # comes again in the run that needs it, and is told there
            importlib.import_module(name)
