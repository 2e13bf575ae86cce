"""The manifest of a folder: a JSON line for each job, kept whole by several processes and through kills."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["MANIFEST", "Manifest", "merge_manifests", "read_manifest"]

MANIFEST = "manifest.jsonl"
_SHARDS = "manifest.*.jsonl"


class Manifest:
    """Appends what became of jobs: the first process to the manifest, each other to a shard of its own.

    Args:
        folder: where to; it exists when the first line is written.
        process: the process's number.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        self._path = folder / (MANIFEST if process == 0 else f"manifest.{process}.jsonl")

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one line; of two about a job the later one holds.

        Raises:
            OSError: the disk is full, or the manifest is a symbolic link.
        """
        data = (json.dumps(finite(line), ensure_ascii=False) + "\n").encode()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.open(self._path, flags, 0o666)
        try:
            while data:
                data = data[os.write(file, data) :]
        finally:
            os.close(file)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The last line about each job, by its name, from the manifest and the shards that a killed run left."""
    return {line["job"]: line for line in _lines(folder) if _is_record(line)}


def merge_manifests(folder: Path, order: Iterable[str] = (), forget: Iterable[str] = ()) -> None:
    """Makes one manifest of it and its shards, a line a job, and drops what a kill cut short.

    Only while no other process writes.

    Args:
        folder: of the manifest.
        order: names of jobs, whose lines come last and so.
        forget: names of jobs whose lines are dropped, and starts of messages whose failures are: they are tried again.

    Raises:
        OSError: the disk is full, or the folder can't be written.
    """
    shards = sorted(folder.glob(_SHARDS))
    path = folder / MANIFEST
    if not shards and not path.exists():
        return
    forgotten, records = set(forget), read_manifest(folder)
    foreign = [line for line in _lines(folder) if not _is_record(line)]
    last = {name: records.pop(name) for name in order if name in records}
    kept = [
        line
        for name, line in {**records, **last}.items()
        if name not in forgotten and not (line.get("error") and line.get("where") in forgotten)
    ]
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [*foreign, *kept]).encode()
    if not path.exists() or path.is_symlink() or path.read_bytes() != data:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    for shard in shards:
        shard.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """A value with None for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _is_record(line: Mapping[str, Any]) -> bool:
    files = line.get("files")
    lists = isinstance(files, list) and all(isinstance(file, str) for file in files)
    return isinstance(line.get("job"), str) and lists and isinstance(line.get("settings"), dict)


def _lines(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in (folder / MANIFEST, *sorted(folder.glob(_SHARDS))):
        for text in path.read_bytes().split(b"\n") if path.is_file() else ():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):  # what a kill cut short
                continue
            if isinstance(line, dict):
                found.append(line)
    return found
