"""Files that ship with the package: the bundled models, the emoji sprites and their licences."""

from importlib.resources import as_file, files
from pathlib import Path

__all__ = ["FEW_STEPS", "asset_path"]

FEW_STEPS = "transformer_4_steps"
"""Folder, in emoji-scenes, of its transformer distilled to four evaluations."""


def asset_path(name: str) -> Path:
    """The real path of a file or folder that ships in ``trimtab.assets``.

    Args:
        name: relative name with forward slashes, such as ``"emoji-scenes"`` or ``"emoji-scenes/README.md"``.

    Returns:
        The path; it exists.

    Raises:
        ValueError: if ``name`` is empty, absolute or leads out of the folder.
        FileNotFoundError: if no asset has this name, naming those there are.
    """
    parts = name.split("/")
    if not name or name.startswith("/") or any(part in ("", ".", "..") for part in parts) or "\\" in name:
        raise ValueError(f"`name` must be a relative name inside trimtab.assets with '/', got {name!r}")
    # Not files("trimtab") / "assets": in a checkout the folders lie beside trimtab/, not in it.
    root = files("trimtab.assets")
    resource = root.joinpath(*parts)
    if not (resource.is_file() or resource.is_dir()):
        there = sorted(item.name for item in root.iterdir() if not item.name.startswith(("_", ".")))
        raise FileNotFoundError(f"trimtab has no asset {name!r}; it has {', '.join(there) or 'none'}")
    with as_file(resource) as path:  # the file itself, not a copy: the package is never zipped
        return path
