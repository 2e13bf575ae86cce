"""Settings that were tuned for a model, in a JSON file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["TunedPreset"]

_FORMAT = "trimtab preset 1"
_PREFIX = "adaptive_projected_guidance_"
_GUIDANCE = ("guidance_scale", "momentum", "rescale", "rescale_rms", "eta")
_NOISE = ("lr", "momentum", "regularization_weight", "max_grad_norm")


@dataclass(frozen=True)
class TunedPreset:
    """What `trimtab tune` writes, and what takes it.

    `AdaptiveProjectedGuidance.from_preset(path)` takes `guidance`, `preset=path` of noise optimization takes `noise`,
    and `trimtab generate --guidance path` the former.

    Attributes:
        guidance: of adaptive projected guidance: "guidance_scale", "momentum", "rescale_rms", "rescale", "eta".
        noise: of the noise's optimizer: "lr", "momentum", "regularization_weight", "max_grad_norm".
        tuned: how it came about: prompts, judge, values before and after. Nothing reads it.

    Example:
        >>> TunedPreset(guidance={"guidance_scale": 6.0}).guidance_arguments()
        {'guidance_scale': 6.0}
    """

    guidance: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    tuned: dict[str, Any] = field(default_factory=dict)

    def guidance_arguments(self) -> dict[str, float]:
        """Keyword arguments of `AdaptiveProjectedGuidance`."""
        plain = ("guidance_scale", "eta")
        return {name if name in plain else _PREFIX + name: value for name, value in self.guidance.items()}

    def save(self, path: str | Path) -> None:
        """Writes the file under a temporary name, then renames it."""
        path = Path(path)
        content = {"format": _FORMAT, "guidance": self.guidance, "noise": self.noise, "tuned": self.tuned}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> TunedPreset:
        """Reads a file.

        Raises:
            FileNotFoundError: if it isn't there.
            ValueError: if it is no such file, or a setting is unknown or no finite number.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no JSON file: {error}") from None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"{path} is no preset; takes a file that `trimtab tune` wrote, of format {_FORMAT!r}")
        guidance = _checked(path, "guidance", content.get("guidance", {}), _GUIDANCE)
        return cls(guidance, _checked(path, "noise", content.get("noise", {}), _NOISE), dict(content.get("tuned", {})))


def _checked(path: str | Path, part: str, values: Any, names: tuple[str, ...]) -> dict[str, float]:
    if not isinstance(values, Mapping) or set(values) - set(names):
        got = sorted(values) if isinstance(values, Mapping) else type(values).__name__
        raise ValueError(f"{path}: {part!r} has {got}; takes settings among {', '.join(names)}")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{path}: {part!r} has {name} {value!r}; takes a finite number")
    return {name: float(value) for name, value in values.items()}
