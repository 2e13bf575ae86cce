"""The runs that ``trimtab optimize`` is asked for: from flags or from a JSONL file, checked before anything runs."""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.commands.errors import UsageError
from trimtab.commands.generate import check_size
from trimtab.commands.jobs import KEYS, Job, Key, check_entry, is_text, read_jobs
from trimtab.commands.json_lines import given_path
from trimtab.commands.pictures import slug

__all__ = ["JOB_KEYS", "OF_THE_RUN", "optimize_jobs", "reward_weights"]

OF_THE_RUN = ("num_optimization_steps", "optimizer", "gradient", "preset", "monitor_patience")
"""Settings that the pipeline's call has under the same names."""

JOB_KEYS = {
    **KEYS,
    "reward_prompt": Key(str),
    "num_optimization_steps": Key(int, 1),
    "optimizer": Key(str),
    "gradient": Key(str),
    "preset": Key(str),
    "learning_rate": Key(float, 0, above=True),
    "monitor_patience": Key(int, 1),
}
_NULLABLE = [
    key for key in JOB_KEYS if key not in ("prompt", "seed", "num_optimization_steps", "optimizer", "gradient")
]


def optimize_jobs(
    args: argparse.Namespace, common: Mapping[str, Any], multiple: int, endings: Sequence[str]
) -> list[Job]:
    """The pictures that are asked for.

    Args:
        args: the command's.
        common: settings that all of them have alike.
        multiple: of which height and width must be.
        endings: all that a picture's files may end in.

    Returns:
        Each with its settings.

    Raises:
        UsageError: if a setting is missing, unknown or of the wrong type, or the file can't be read; of a JSONL file
            only where that holds for every line.
    """

    def settings(line: Any, where: str, beside: Path) -> Iterator[dict[str, Any]]:
        check_entry(line, JOB_KEYS, where, required=["prompt"], nullable=_NULLABLE)
        given = {**common, **{key: line.get(key, getattr(args, key, None)) for key in JOB_KEYS}}
        check_size(given, multiple, where)
        if not all(is_text(value) for value in given.values() if isinstance(value, str)):
            raise UsageError("flags take texts in UTF-8")
        if where and str(line.get("preset", "")).endswith(".json"):
            given["preset"] = str(beside / given_path(line["preset"], f'{where}"preset"'))
        for image in range(args.num_images):
            yield {**given, "seed": given["seed"] + image}

    if args.input is not None:
        if args.prompts:
            raise UsageError("--input has the prompts; leave PROMPT away")
        return read_jobs(args.input, settings, _name, endings)
    if not args.prompts:
        raise UsageError("give at least one PROMPT or a file of them with --input")
    lines = enumerate({"prompt": prompt} for prompt in args.prompts)
    return [Job(_name(index, one), one) for index, line in lines for one in settings(line, "", Path())]


def _name(index: int, settings: Mapping[str, Any]) -> str:
    return f"{index:04d}-{slug(settings['prompt'])}-seed{settings['seed']}"


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
