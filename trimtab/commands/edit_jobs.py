"""The edits that ``trimtab edit`` is asked for: from flags or from a JSONL file, checked before anything runs."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.commands.errors import UsageError
from trimtab.commands.jobs import Job, check_keys, is_text, read_jobs
from trimtab.commands.json_lines import given_path
from trimtab.commands.pictures import slug

__all__ = ["KEYS", "OPTIONAL", "edit_jobs"]

_REQUIRED = {"image": str, "source_prompt": str, "prompt": str}
OPTIONAL: dict[str, Any] = {
    "negative_prompt": str,
    "mask": str,
    "blend": str,
    "strength": float,
    "guidance_scale": float,
    "steps": int,
    "iterations": int,
    "step_size": float,
    "acceleration": str,
    "locality": float,
    "pick": int,
    "height": int,
    "width": int,
}
KEYS = (*_REQUIRED, *OPTIONAL)


def edit_jobs(args: argparse.Namespace, endings: Sequence[str]) -> list[Job]:
    """The edits that are asked for.

    Args:
        args: the command's, with an attribute for each key of a line of the file.
        endings: all that an edit's files may end in.

    Returns:
        Each with complete settings, paths resolved.

    Raises:
        UsageError: if a setting is missing, unknown, of the wrong type or out of range, or a file isn't there; of a
            JSONL file only where that holds for every line.
    """
    made_by = {"model": args.model or "bundled", "dtype": args.dtype}
    defaults = {key: getattr(args, key) for key in OPTIONAL}
    if args.input is None:
        given = {key: getattr(args, key) for key in _REQUIRED}
        if missing := [_flag(key) for key, value in given.items() if value is None]:
            raise UsageError(f"give {', '.join(missing)}, or a file of edits with --input")
        job = _checked({**defaults, **given}, Path(), "")
        return [Job(f"{slug(Path(args.image).stem, 24)}-{slug(args.prompt)}", {**made_by, **job})]
    if extra := [_flag(key) for key in _REQUIRED if getattr(args, key) is not None]:
        raise UsageError(f"--input has the pictures and prompts; leave {', '.join(extra)} away")

    def settings(line: Any, where: str, beside: Path) -> list[dict[str, Any]]:
        check_keys(line, KEYS, where, list(_REQUIRED))
        asked = {key: value for key, value in line.items() if key != "id"}
        return [{**made_by, **_checked({**defaults, **asked}, beside, where)}]

    return read_jobs(args.input, settings, lambda index, job: f"{index:04d}-{slug(job['prompt'])}", endings)


def _checked(job: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """The settings of an edit, in range and with the paths of files that are there."""
    for key, kind in {**_REQUIRED, **OPTIONAL}.items():
        value = job[key]
        numbers = (int, float) if kind is float else kind
        wrong = (
            isinstance(value, bool) or not isinstance(value, numbers) or (isinstance(value, str) and not is_text(value))
        )
        if value is not None and wrong:
            raise UsageError(f"{where}{_named(key, where)} takes {_KINDS[kind]}; got {value!r}")
        if value is None and key in (*_REQUIRED, "strength", "guidance_scale", "steps", "iterations", "acceleration"):
            raise UsageError(f"{where}{_named(key, where)} takes {_KINDS[kind]}; got null")
    for key, low in (("steps", 1), ("iterations", 0), ("pick", 0), ("height", 1), ("width", 1)):
        if job[key] is not None and job[key] < low:
            raise UsageError(f"{where}{_named(key, where)} takes a whole number, {low} or more; got {job[key]}")
    if not 0 < job["strength"] <= 1:
        raise UsageError(f"{where}{_named('strength', where)} takes a number in (0, 1]; got {job['strength']}")
    if job["pick"] is not None and job["pick"] > job["iterations"]:
        raise UsageError(
            f"{where}{_named('pick', where)} takes 0 to {job['iterations']}, its iterations; got {job['pick']}"
        )
    if job["blend"] is not None and job["mask"] is None:
        raise UsageError(f"{where}{_named('blend', where)} takes a mask beside it; there is none")
    for key in ("guidance_scale", "step_size", "locality"):
        value = job[key]
        if value is not None and not (math.isfinite(value) and (value > 0 or key == "guidance_scale" and value == 0)):
            raise UsageError(f"{where}{_named(key, where)} takes a finite positive number; got {value}")
    for key in ("image", "mask"):
        if job[key] is not None:
            path = folder / given_path(job[key], f"{where}{_named(key, where)}")
            if not path.is_file():
                raise UsageError(f"{where}{_named(key, where)} takes a picture's file; {path} is none")
            job[key] = str(path)
    return job


_KINDS = {str: "a text", float: "a number", int: "a whole number"}


def _flag(key: str) -> str:
    return "IMAGE" if key == "image" else f"--{key.replace('_', '-')}"


def _named(key: str, where: str) -> str:
    """A setting's name as the user wrote it: a key of the file, or a flag."""
    return f'"{key}"' if where else _flag(key)
