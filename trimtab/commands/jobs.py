"""The jobs of ``trimtab generate``, ``edit``, ``optimize`` and ``reconstruct``: what is asked for, by what name.

A job's name is that of its files, and by it a run that goes on knows what is done. So each has files of its own, in
the folder, whatever a line of the input calls itself.
"""

import argparse
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.commands.errors import UsageError
from trimtab.commands.json_lines import given_path, json_lines, parsed

__all__ = ["KEYS", "Job", "Key", "add_input_argument", "check_entry", "check_keys", "is_text", "read_jobs"]

MOST_BYTES = 128
"""Of an id: with a seed, an ending and a temporary file's mark it stays below the 255 that a file's name has."""


@dataclass(frozen=True)
class Job:
    """One thing to make.

    Attributes:
        name: its files' name, before their endings; unlike all others'.
        settings: all that its result depends on, as JSON has it; ``seed`` among them where anything is random.
        where: the line that asked for it, such as ``jobs.jsonl line 3``; None where flags did.
        error: why it cannot be run; None where it can.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    where: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Key:
    """What a key of a line takes.

    Attributes:
        kind: str, float or int.
        low: the least number, which ``above`` leaves out.
        high: the largest number.
        above: whether ``low`` itself is refused.
    """

    kind: type
    low: float = 0
    high: float = float("inf")
    above: bool = False

    @property
    def takes(self) -> str:
        """In words."""
        if self.kind is str:
            return "a text"
        number = "a whole number" if self.kind is int else "a number"
        upper = f" to {self.high:g}" if self.high < 2**53 else " to 2**63 - 1" if self.high < float("inf") else ""
        return f"{number} above {self.low:g}{upper}" if self.above else f"{number}, {self.low:g}{upper or ' or more'}"

    def refuses(self, value: Any) -> bool:
        """Whether it is no such value."""
        if self.kind is str:
            return not isinstance(value, str) or not is_text(value)
        numbers = (int, float) if self.kind is float else int
        if isinstance(value, bool) or not isinstance(value, numbers):
            return True
        return not (self.low <= value <= self.high) or value == float("inf") or (self.above and value == self.low)


KEYS = {
    "prompt": Key(str),
    "negative_prompt": Key(str),
    "seed": Key(int, high=2**63 - 1),
    "steps": Key(int, 1),
    "guidance_scale": Key(float),
    "height": Key(int, 1),
    "width": Key(int, 1),
}
"""Keys that mean the same in several commands."""


def is_text(value: str) -> bool:
    """Whether a text can be written: halves of characters, which bytes of a command line may become, cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def add_input_argument(parser: argparse.ArgumentParser, keys: Iterable[str]) -> None:
    """Adds ``--input``.

    Args:
        parser: of the command.
        keys: that a line may have.
    """
    parser.add_argument(
        "--input",
        metavar="FILE",
        help=f"a JSONL file with a job a line: {', '.join(keys)}, and id, its files' name; what a line lacks is what "
        "the flags say, and paths are from the file's folder",
    )


def check_entry(
    entry: Any, keys: Mapping[str, Key], where: str, *, required: Sequence[str] = (), nullable: Sequence[str] = ()
) -> dict[str, Any]:
    """Makes sure that a line is an object with the right keys and values.

    Args:
        entry: its value.
        keys: what each takes; ``id`` is known to all commands.
        where: the start of a message about it.
        required: keys that must be there.
        nullable: keys that may be null.

    Raises:
        UsageError: if it is not.
    """
    check_keys(entry, keys, where, required)
    for key, value in entry.items():
        if key == "id" or (value is None and key in nullable):
            continue
        if keys[key].refuses(value):
            raise UsageError(f'{where}"{key}" takes {keys[key].takes}; got {_short(value)}')
    if isinstance(entry.get("prompt"), str) and not entry["prompt"].strip():
        raise UsageError(f"{where}a prompt must have a word in it; got {_short(entry['prompt'])}")
    return entry


def check_keys(entry: Any, keys: Iterable[str], where: str, required: Sequence[str] = ()) -> None:
    """Makes sure that a line is an object with the right keys; arguments and error as in :func:`check_entry`."""
    if not isinstance(entry, dict):
        raise UsageError(f"{where}takes an object with {', '.join(required)}; got {_short(entry)}")
    known = [*keys, "id"]
    if unknown := set(entry) - set(known):
        names = ", ".join(sorted(unknown))[:80]
        raise UsageError(f"{where}knows no {names}; takes {', '.join(known)}")
    if missing := [key for key in required if key not in entry]:
        raise UsageError(f"{where}lacks {', '.join(missing)}")


def read_jobs(
    input: str,
    settings: Callable[[dict[str, Any], str, Path], Iterable[Mapping[str, Any]]],
    name: Callable[[int, Mapping[str, Any]], str],
    endings: Sequence[str],
) -> list[Job]:
    """The jobs of a JSONL file. A line that is none becomes a job with its error, so that the others are done.

    Args:
        input: the file's path.
        settings: a line's value, the start of a message and the file's folder to the settings of its jobs, mostly one.
        name: the line's number from 0 and a job's settings to its name, where the line has no ``id``.
        endings: all that a job's files may end in.

    Raises:
        UsageError: if the file can't be read, or no line is a job.
    """
    file = given_path(input, "--input")
    jobs: list[Job] = []
    owners: dict[str, str] = {}
    for index, (where, line) in enumerate(json_lines(file)):
        place = where.removesuffix(": ")
        try:
            value = parsed(line, where)
            identity = _checked_id(value, where)
            several = list(settings(value, where, file.parent))
            for one in several:
                stem = name(index, one) if identity is None else identity
                if identity is not None and len(several) > 1:
                    stem += f"-seed{one['seed']}"
                _claim(stem, endings, owners, place, where)
                jobs.append(Job(stem, one, place))
        except UsageError as error:
            jobs.append(Job(place, where=place, error=str(error).removeprefix(where)))
    if not jobs:
        raise UsageError(f"--input takes a file with a job a line; {file} has none")
    if all(job.error for job in jobs):
        raise UsageError(f"{jobs[0].where}: {jobs[0].error}")
    return jobs


def _checked_id(value: Any, where: str) -> str | None:
    given = value.get("id") if isinstance(value, dict) else None
    if given is None:
        return None
    right = isinstance(given, str) and re.fullmatch(r"\w([\w.-]*[\w-])?", given)
    if not right or len(unicodedata.normalize("NFC", given).encode()) > MOST_BYTES:
        takes = f"letters, digits, _ and -, with dots between, at most {MOST_BYTES} bytes: it names files in the folder"
        raise UsageError(f'{where}"id" takes {takes}; got {_short(given)}')
    return unicodedata.normalize("NFC", given)


def _claim(stem: str, endings: Sequence[str], owners: dict[str, str], place: str, where: str) -> None:
    """Files belong to one job, also where a file system takes A for a."""
    files = [unicodedata.normalize("NFC", stem + ending).casefold() for ending in endings]
    if taken := next((file for file in files if file in owners), None):
        raise UsageError(f'{where}its files, such as {taken}, are those of {owners[taken]}; give another "id"')
    owners.update(dict.fromkeys(files, place))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
