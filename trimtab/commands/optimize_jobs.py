"""The runs that ``trimtab optimize`` is asked for: from flags or from a JSONL file, checked before anything runs."""

import argparse
import math
from pathlib import Path
from typing import Any

from trimtab.commands.errors import UsageError
from trimtab.commands.json_lines import json_lines
from trimtab.commands.pictures import slug

__all__ = ["optimize_jobs", "reward_weights"]

_KEYS = {
    "prompt": "a text",
    "seed": "a whole number, 0 or more",
    "negative_prompt": "a text",
    "reward_prompt": "a text",
}


def optimize_jobs(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Names and settings of the pictures that are asked for.

    Args:
        args: the command's.

    Returns:
        A name for its files, and prompt, seed and further texts of each picture.

    Raises:
        UsageError: if a setting is missing, unknown or of the wrong type, or the file can't be read.
    """
    given = [{"prompt": prompt} for prompt in args.prompts]
    where = ["PROMPT: "] * len(given)
    if args.jobs is not None:
        for start, line, value in json_lines(Path(args.jobs).expanduser()):
            where.append(start)
            given.append(_entry(value, line, start))
    if not given:
        raise UsageError("give at least one PROMPT or a file of them with --jobs")
    jobs = []
    for index, (entry, place) in enumerate(zip(given, where, strict=True)):
        first = _checked({"seed": args.seed, "negative_prompt": args.negative_prompt, **entry}, place)
        for image in range(args.num_images):
            job = {"reward_prompt": None, **first, "seed": first["seed"] + image}
            jobs.append((f"{index:04d}-{slug(job['prompt'])}-seed{job['seed']}", job))
    return jobs


def reward_weights(given: list[str]) -> str | dict[str, float]:
    """What ``--reward`` names: one reward, or several with their weights.

    Args:
        given: NAME or NAME=WEIGHT, once or more often.

    Raises:
        UsageError: for a weight that is no finite number, or a name that comes twice.
    """
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    weights: dict[str, float] = {}
    for text in given:
        name, _, number = text.partition("=")
        try:
            weight = float(number) if number else 1.0
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise UsageError(f"--reward takes NAME or NAME=WEIGHT with a finite number; got {text!r}")
        if name in weights:
            raise UsageError(f"--reward takes each reward once; got {name} twice")
        weights[name] = weight
    return weights


def _entry(entry: Any, line: str, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or "prompt" not in entry:
        raise UsageError(f"{where}takes an object with a prompt; got {line.strip()[:40]}")
    if unknown := set(entry) - set(_KEYS):
        raise UsageError(f"{where}knows no {', '.join(sorted(unknown))}; takes {', '.join(_KEYS)}")
    return entry


def _checked(entry: dict[str, Any], where: str) -> dict[str, Any]:
    for key, takes in _KEYS.items():
        value = entry.get(key)
        if key == "seed":
            right = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62
        else:
            right = isinstance(value, str) or (value is None and key != "prompt")
        if not right:
            raise UsageError(f'{where}"{key}" takes {takes}; got {value!r}')
    if not entry["prompt"].strip():
        raise UsageError(f"{where}a prompt must have a word in it; got {entry['prompt']!r}")
    return entry
