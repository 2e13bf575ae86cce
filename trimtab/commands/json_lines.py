"""Files with one job a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.commands.errors import UsageError, first_line

__all__ = ["json_lines"]


def json_lines(file: Path) -> Iterator[tuple[str, str, Any]]:
    """The values of a JSONL file; blank lines are passed over.

    Args:
        file: given as ``--jobs``.

    Yields:
        For each line the start of a message about it, its text and its value.

    Raises:
        UsageError: if the file can't be read or a line is no JSON, when its turn comes.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--jobs takes a JSONL file; {file}: {first_line(error)}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{file} line {number}: "
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{where}no JSON: {first_line(error)}") from None
            yield where, line, value
