"""Trimtab code as text: what "Copy as Python" is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trimtab.assets import FEW_STEPS

from .limits import BUNDLED

__all__ = ["Raw", "call", "device_of_code", "load_pipeline_code", "sequence_length_code"]

_LONGEST = 100


class Raw(str):
    """A piece of code, where other values are written as literals."""


def call(function: str, *arguments: Any, **keywords: Any) -> str:
    """A call as code: on one line if it is short, else an argument a line.

    Args:
        function: what is called, such as "pipe" or "image = pipe".
        arguments: positional ones.
        keywords: by name; those that are None are left out.

    Example:
        >>> call("out = pipe", "a cat", seed=Raw("SEED"), scale=None)
        'out = pipe("a cat", seed=SEED)'
    """
    parts = [_literal(value) for value in arguments]
    parts += [f"{name}={_literal(value)}" for name, value in keywords.items() if value is not None]
    line = f"{function}({', '.join(parts)})"
    if len(line) <= _LONGEST and "\n" not in line:
        return line
    inner = "".join(f"    {part},\n" for part in parts)
    return f"{function}(\n{inner})"


def load_pipeline_code(model: str, *, few_steps: bool = False) -> tuple[list[str], str]:
    """Imports, and the lines that load the app's model as ``pipe``: as the app does, on this machine.

    Args:
        model: its name in the app.
        few_steps: whether with the bundled model's distilled transformer.
    """
    device = device_of_code()
    dtype = Raw("torch.bfloat16" if device == "cuda" else "torch.float32")
    where = Raw('asset_path("emoji-scenes")') if model == BUNDLED else model
    imports = ["import torch", "from diffusers import DiffusionPipeline"]
    lines, others = [], {}
    if few_steps:
        imports[1] += ", SD3Transformer2DModel"
        make = "transformer = SD3Transformer2DModel.from_pretrained"
        lines.append(call(make, where, subfolder=FEW_STEPS, dtype=dtype))
        others["transformer"] = Raw("transformer")
    imports += ["from trimtab.assets import asset_path"] if model == BUNDLED else []
    lines.append(call("pipe = DiffusionPipeline.from_pretrained", where, **others, dtype=dtype))
    if device != "cpu":
        lines[-1] += f'.to("{device}")'
    return imports, "\n".join(lines)


def device_of_code() -> str:
    """Where the app's model runs."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else "cpu"


def sequence_length_code(model: str) -> dict[str, int]:
    """The argument that spares the bundled model's padding."""
    return {"max_sequence_length": 16} if model == BUNDLED else {}


def _literal(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, str) and value.isprintable():
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_literal(inner) for inner in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(name)}: {_literal(inner)}" for name, inner in value.items()) + "}"
    return repr(value)
