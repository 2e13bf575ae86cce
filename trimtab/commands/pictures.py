"""Writes pictures so that none is ever half there, each with what made it."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab import __version__
from trimtab.commands.errors import UsageError
from trimtab.commands.json_lines import given_path

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["check_folder", "save_png", "slug", "write_json"]


def check_folder(output: str) -> Path:
    """Makes sure, before any model runs, that a folder can be written; creates nothing.

    Raises:
        UsageError: if the path or one above it is a file, or may not be written.
    """
    folder = given_path(output, "--output")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UsageError(f"--output takes a folder, made if missing; {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"--output takes a folder that can be written; {nearest} cannot")
    return folder


def save_png(image: "Image", path: Path, made_by: Mapping[str, Any]) -> None:
    """Writes a PNG under a temporary name in its folder, then renames it.

    Args:
        image: the picture.
        path: where to; its folder exists. A file of that name is replaced.
        made_by: what made the picture, written into its text fields (``Image.open(path).text``): each string
            as it is, all other values as JSON.
    """
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("Software", f"trimtab {__version__}")
    for name, value in made_by.items():
        text.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.save(temporary, format="png", pnginfo=text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file under a temporary name in its folder, then renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def slug(text: str, length: int = 48) -> str:
    """A text as part of a file name: letters and digits of any script, with dashes between, and at most 144 bytes."""
    short = re.sub(r"[\W_]+", "-", text[: 100 * length].lower()).strip("-")[:length].encode()[:144]
    return short.decode(errors="ignore").strip("-") or "picture"
