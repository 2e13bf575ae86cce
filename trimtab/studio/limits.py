"""What one visitor may ask for, from environment variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["BUNDLED", "Limits"]

BUNDLED = "bundled"
"""The bundled model's name in the app."""


@dataclass(frozen=True)
class Limits:
    """Limits of the app.

    Attributes:
        models: folders in the Diffusers layout or Hub ids that may be used, the default first; ``"bundled"`` is the
            bundled one. From ``TRIMTAB_MODEL`` and ``TRIMTAB_ALLOWED_MODELS`` (separated by commas).
        rewards: names in ``trimtab.rewards.REWARDS`` that may be chosen, the bundled one first; the others from
            ``TRIMTAB_ALLOWED_REWARDS`` (separated by commas), fetched from the Hub when first used.
        largest_picture: longest side of a picture in pixels, uploaded or made; ``TRIMTAB_LARGEST_PICTURE``.
        largest_upload: of a file, in megabytes; ``TRIMTAB_LARGEST_UPLOAD``.
        longest_run: seconds after which a run ends with what it has; ``TRIMTAB_LONGEST_RUN``.
        queue_length: runs that may wait; ``TRIMTAB_QUEUE_LENGTH``.
    """

    models: tuple[str, ...] = (BUNDLED,)
    rewards: tuple[str, ...] = (BUNDLED,)
    largest_picture: int = 1024
    largest_upload: int = 20
    longest_run: int = 600
    queue_length: int = 40

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Limits":
        """Reads the variables; those that are missing or empty keep their defaults.

        Args:
            environment: None is the process's own.

        Raises:
            ValueError: if a number is none, or below 1, or there is no such reward.

        Example:
            >>> Limits.from_environment({"TRIMTAB_MODEL": "a/b", "TRIMTAB_ALLOWED_MODELS": "bundled, a/b"}).models
            ('a/b', 'bundled')
        """
        environment = os.environ if environment is None else environment
        default = environment.get("TRIMTAB_MODEL", "").strip() or BUNDLED
        models = tuple(dict.fromkeys([default, *_names(environment, "TRIMTAB_ALLOWED_MODELS")]))
        rewards = tuple(dict.fromkeys([BUNDLED, *_rewards(environment)]))
        numbers = {
            name: _count(environment, f"TRIMTAB_{name.upper()}", getattr(cls, name))
            for name in ("largest_picture", "largest_upload", "longest_run", "queue_length")
        }
        return cls(models, rewards, **numbers)


def _names(environment: Mapping[str, str], name: str) -> list[str]:
    return [word.strip() for word in environment.get(name, "").split(",") if word.strip()]


def _rewards(environment: Mapping[str, str]) -> list[str]:
    if not (given := _names(environment, "TRIMTAB_ALLOWED_REWARDS")):
        return []
    from trimtab.rewards import REWARDS

    if unknown := [name for name in given if name not in REWARDS]:
        raise ValueError(f"TRIMTAB_ALLOWED_REWARDS takes names among {', '.join(REWARDS)}; got {', '.join(unknown)}")
    return given


def _count(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip()
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(f"{name} takes a whole number, 1 or more; got {text!r}")
    return value
