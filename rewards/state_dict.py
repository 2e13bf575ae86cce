"""Published weights by their names: read from safetensors, renamed by rules, loaded with nothing left over."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

__all__ = ["load_exactly", "read_weights", "renamed", "write_weights"]


def write_weights(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file under a temporary name, then renames it; makes its folder."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({key: value.detach().cpu().clone().contiguous() for key, value in state.items()}, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        ValueError: if it is no such file; pickles (.pt, .pth, .ckpt, .bin) are never read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if Path(path).suffix != ".safetensors":
        raise ValueError(f"`path` is {str(path)!r}; takes a .safetensors file (see trimtab.rewards.save_weights)")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"`path` is {str(path)!r}, no whole safetensors file: {error}") from None


def renamed(state: dict[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Entries whose whole name matches a rule's pattern, under the name that the first such rule makes of it.

    Args:
        state: weights by name.
        rules: (regular expression, replacement) pairs.

    Example:
        >>> renamed({"a.0.w": 1, "b": 2}, [(r"a\\.(\\d+)\\.w", r"layers.\\1.weight")])
        {'layers.0.weight': 1}
    """
    found = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            match = re.fullmatch(pattern, name)
            if match:
                found[match.expand(replacement)] = value
                break
    return found


def load_exactly(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Loads weights into a module; each of its parameters must be there, and nothing else.

    Raises:
        ValueError: for a missing, a superfluous or a misshapen weight, naming the first few.
    """
    wanted = module.state_dict()
    missing, unknown = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    shapes = [name for name in wanted if name in state and wanted[name].shape != state[name].shape]
    wrong: list[Any] = [
        f"{label} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for label, names in (("it lacks", missing), ("it also has", unknown), ("of another shape:", shapes))
        if names
    ]
    if wrong:
        raise ValueError(f"the weights are not those of {what}: {'; '.join(wrong)}")
    module.load_state_dict(state)
