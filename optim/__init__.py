"""Solvers and optimizers on tensors and callables; nothing here knows of diffusion pipelines.

All that the folders and modules below export is here by its name. They are imported when one of their names is first
asked for: the optimizers for training bring torch's compiler with them, which takes seconds.
"""

import importlib
from typing import Any

_PARTS = ("constrained", "search", "solvers", "training", "policy", "inference", "protect", "analysis")


def __getattr__(name: str) -> Any:
    """A name of one of the parts, or all of them (PEP 562)."""
    if name == "__all__":
        return sorted(entry for part in _PARTS for entry in _part(part).__all__)
    if name.startswith("_"):
        raise AttributeError(f"module 'trimtab.optim' has no attribute {name!r}")
    if name in _PARTS:
        return _part(name)
    for part in map(_part, _PARTS):
        if name in part.__all__:
            value = globals()[name] = getattr(part, name)
            return value
    raise AttributeError(f"module 'trimtab.optim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS, *__getattr__("__all__")})


def _part(name: str) -> Any:
    return importlib.import_module(f"trimtab.optim.{name}")
