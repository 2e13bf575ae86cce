"""A taste as a file: what a visitor's choices gave, or what somebody uploaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .rewards import loaded_reward

if TYPE_CHECKING:
    from trimtab.rewards import PersonalReward

__all__ = ["FEATURES", "TASTE", "TasteFile"]

TASTE = "taste"
"""The name, among rewards, of the visitor's own."""

FEATURES = ("bundled", "clip", "pickscore")
"""Rewards on whose features a taste may be fitted, where they are allowed."""
_LARGEST = 2_000_000
"""Bytes; a taste has some thousands."""


@dataclass(frozen=True)
class TasteFile:
    """A personal reward's file.

    Attributes:
        path: of any file.
        features: names of the rewards on whose features it may be fitted; no other model is loaded for it.
    """

    path: str
    features: tuple[str, ...]

    def source(self) -> str:
        """The name of the reward on whose features it was fitted.

        Raises:
            ValueError: it is no such file, or of other features; the message does not name the path.
        """
        from trimtab.rewards.personal import FORMAT

        about = _header(Path(self.path)).get("__metadata__")
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ValueError("This file is no taste made here: those are called taste.safetensors.")
        if about.get("features") not in self.features:
            raise ValueError("This taste was fitted on the features of a model that is not allowed here.")
        return about["features"]

    def load(self, device: Any) -> PersonalReward:
        """The reward.

        Raises:
            ValueError: it cannot be used.
        """
        from trimtab.rewards import PersonalReward

        clip = loaded_reward(self.source(), device)
        try:
            reward = PersonalReward.from_weights(self.path, features=clip, device=device)
        except ValueError as error:
            raise ValueError(f"This taste cannot be used: {str(error).replace(self.path, 'the file')}") from None
        reward.name = "my taste"
        return reward


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: its length in 8 bytes, then JSON."""
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"This file is larger than {_LARGEST // 1_000_000} MB, which no taste is.")
    content = path.read_bytes()
    try:
        found = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
