"""Settings inside the PNG or PLY that they made: written by the app, read back when such a file is dropped on it.

They stand in the PNG's text fields, as those of the command line's pictures do: ``prompt`` and ``seed`` as they are,
``tab`` and ``settings`` besides; in a PLY file these two are comments of its header. What is read was made by anybody,
so nothing is believed: sizes are limited, JSON is plain, and each value must have its setting's type.
"""

from __future__ import annotations

import json
import os
import sys
import types
import typing
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import IO, Any, Literal

__all__ = ["Embedded", "checked_settings", "made_by", "plain_settings", "read_embedded", "with_comments"]

_COMMENT = b"comment trimtab "
_LONGEST_HEADER = 50_000
_MOST_CHARACTERS = 20_000
_MOST_SETTINGS = 64
_LONGEST_TEXT = 4_000
_DEEPEST = 4


@dataclass(frozen=True)
class Embedded:
    """What a picture says about how it was made.

    Attributes:
        tab: where, such as "create"; empty for a picture of the command line.
        settings: by name; plain JSON, not checked any further.
    """

    tab: str
    settings: dict[str, Any]


def plain_settings(job: Any) -> dict[str, Any]:
    """The settings of a job as JSON: its fields but the pictures.

    Args:
        job: an instance of a dataclass of numbers, strings, sequences and mappings of them, and pictures.
    """
    values = {entry.name: getattr(job, entry.name) for entry in fields(job)}
    return {name: _as_json(value) for name, value in values.items() if _is_plain(value)}


def made_by(tab: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``trimtab.commands.pictures.save_png`` is to write into a picture.

    Args:
        tab: where it was made.
        settings: plain JSON, such as :func:`plain_settings` gives.

    Raises:
        ValueError: for settings that :func:`read_embedded` would not take back.
    """
    content = json.dumps(dict(settings), allow_nan=False)
    if reason := _refused(content, json.loads(content)):
        raise ValueError(f"`settings` are too large to embed: {reason}")
    shown = {name: settings[name] for name in ("prompt", "seed") if name in settings}
    return {**shown, "tab": tab, "settings": dict(settings)}


def read_embedded(path: str | os.PathLike[str] | IO[bytes]) -> Embedded | None:
    """What a file of the app, or a picture of the command line, says about how it was made.

    The picture itself is not decoded.

    Args:
        path: of any file, or such a file, open.

    Returns:
        None where there is nothing to read: no PNG or PLY, no settings in it, or settings that are broken, too large
        or no plain JSON.
    """
    try:
        texts = _texts_of(path)
    except Exception:  # broken files raise nearly anything
        return None
    content = texts.get("settings", "")
    try:
        found = json.loads(content, parse_constant=_no_constant) if len(content) <= _MOST_CHARACTERS else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or _refused(content, found):
        return None
    if "prompt" in texts and len(texts["prompt"]) <= _LONGEST_TEXT:
        found.setdefault("prompt", str(texts["prompt"]))
    if texts.get("seed", "").isdecimal() and len(texts["seed"]) < 20:
        found.setdefault("seed", int(texts["seed"]))
    tab = texts.get("tab", "")
    return Embedded(str(tab) if tab.isidentifier() and len(tab) <= 40 else "", found)


def with_comments(content: bytes, made_by: Mapping[str, Any]) -> bytes:
    """A PLY file that says how it was made.

    Args:
        content: a PLY file.
        made_by: what :func:`made_by` gave.
    """
    lines = [_COMMENT + f"{name} {value}".encode("ascii") for name, value in
             (("tab", made_by["tab"]), ("settings", json.dumps(made_by["settings"])))]  # fmt: skip
    kind, form, rest = content.split(b"\n", 2)
    return b"\n".join([kind, form, *lines, rest])


def checked_settings(job_class: type, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Those of the settings that a job has, each of its field's type.

    Args:
        job_class: a dataclass whose fields have types.
        settings: from anywhere.

    Returns:
        The settings as the fields take them, and the names of those that were left out: unknown, of another type,
        or not finite. Ranges are the job's to check.

    Example:
        >>> @dataclass
        ... class Job:
        ...     prompt: str
        ...     scale: float = 1.0
        >>> checked_settings(Job, {"prompt": "a cat", "scale": "high", "colour": 1})
        ({'prompt': 'a cat'}, ['scale', 'colour'])
    """
    hints = typing.get_type_hints(job_class)
    names = {entry.name for entry in fields(job_class)}
    taken = {name: value for name, value in settings.items() if name in names and _fits(value, hints[name])}
    return taken, [str(name) for name in settings if name not in taken]


def _texts_of(path: str | os.PathLike[str] | IO[bytes]) -> dict[str, str]:
    """The text fields of a PNG, or our comments of a PLY file, by name."""
    with open(path, "rb") if isinstance(path, (str, os.PathLike)) else nullcontext(path) as file:
        return _texts_of_file(file)


def _texts_of_file(file: IO[bytes]) -> dict[str, str]:
    from PIL import Image

    header = file.read(_LONGEST_HEADER)
    file.seek(0)
    if header.startswith(b"ply\n"):
        lines = header.partition(b"end_header")[0].splitlines()
        comments = [line[len(_COMMENT) :].decode("ascii") for line in lines if line.startswith(_COMMENT)]
        return dict(comment.split(" ", 1) for comment in comments)
    # Pillow limits what a text field may unpack to, and warns of pictures too large to decode.
    with warnings.catch_warnings(action="ignore"), Image.open(file, formats=["PNG"]) as image:
        return {name: text for name, text in image.info.items() if isinstance(text, str)}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value has a type: of plain types, unions, literals, and sequences and mappings of them."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin in (tuple, list):
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(_fits(one, inner[1]) for one in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint in (None, types.NoneType):
        return value is None
    return hint in (str, int, bool) and type(value) is hint


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(one) for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, (str, int, float))


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _as_json(one) for name, one in value.items()}
    return [_as_json(one) for one in value] if isinstance(value, (list, tuple)) else value


def _refused(content: str, found: dict[str, Any]) -> str:
    """Why settings are not taken; empty if they are."""
    if len(content) > _MOST_CHARACTERS:
        return f"{len(content)} characters, {_MOST_CHARACTERS} at most"
    if len(found) > _MOST_SETTINGS:
        return f"{len(found)} settings, {_MOST_SETTINGS} at most"
    return _refused_value(found, 1)


def _refused_value(value: Any, depth: int) -> str:
    if depth > _DEEPEST:
        return f"nested deeper than {_DEEPEST}"
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        return f"a text of {len(value)} characters, {_LONGEST_TEXT} at most"
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((reason for one in inner if (reason := _refused_value(one, depth + 1))), "")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
