"""Files with one JSON value a line."""

import json
from pathlib import Path
from typing import Any, NoReturn

from trimtab.commands.errors import UsageError, first_line

__all__ = ["given_path", "json_lines", "parsed"]


def json_lines(file: Path) -> list[tuple[str, str]]:
    """The lines of a JSONL file; blank ones are passed over.

    Args:
        file: given as ``--input``.

    Returns:
        For each line the start of a message about it, such as ``jobs.jsonl line 3: ``, and its text.

    Raises:
        UsageError: if the file can't be read.
    """
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")  # a text may hold what splitlines() splits at
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--input takes a JSONL file; {file}: {first_line(error)}") from None
    return [(f"{file} line {number}: ", line) for number, line in enumerate(lines, start=1) if line.strip()]


def parsed(line: str, where: str) -> Any:
    """The value of a line.

    Args:
        line: its text.
        where: the start of a message about it.

    Raises:
        UsageError: if it is no JSON, or holds what can't be written again: NaN, infinity or half a character.
    """
    try:
        value = json.loads(line, parse_constant=_refuse, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise UsageError(f"{where}no JSON: {first_line(error)[:200]}") from None
    return value


def given_path(text: str, named: str) -> Path:
    """A path that the user gave, with ``~`` resolved.

    Args:
        text: as it was given.
        named: the flag or key, for messages.

    Raises:
        UsageError: if no file can have this name.
    """
    try:
        path = Path(text).expanduser()
        path.exists()  # a name that is too long raises
        if "\0" in text:
            raise ValueError("it holds a NUL")
        text.encode("utf-8", "strict")
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{named} takes a path; got {text[:60]!r}: {first_line(error)[:120]}") from None
    return path


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) < float("inf") else _refuse(text)
