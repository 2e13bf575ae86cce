"""Where the clouds of the Points tab come from: shapes drawn by procedure, and files that somebody uploaded."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checks import check_whole
from .code import Raw, call

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ENDINGS", "MOST_NUMBER", "NUM_POINTS", "SHAPES", "Shape", "Upload"]

SHAPES = (
    "chair", "table", "lamp", "mug", "vase", "car", "plane", "rocket", "house", "tree", "heart", "butterfly",
    "bench", "sofa", "goblet", "guitar", "snowman", "umbrella",
)  # fmt: skip
"""Shapes to begin with; the last six are of classes that the bundled model was not trained on."""
ENDINGS = (".ply", ".obj", ".stl", ".glb", ".off", ".npz", ".npy", ".xyz", ".txt", ".pts", ".csv")
"""What may be uploaded: not glTF, whose numbers lie in other files."""
MOST_NUMBER = 9999
NUM_POINTS = 1024
"""Points of the bundled model's clouds."""
_UNPACKED = 200_000_000
"""Bytes that an archive may hold."""


@dataclass(frozen=True)
class Shape:
    """A shape drawn by procedure, one that training did not use.

    Attributes:
        name: one of ``SHAPES``.
        number: which one of its class, 0 to 9999.

    Raises:
        ValueError: another.
    """

    name: str
    number: int

    def __post_init__(self) -> None:
        if self.name not in SHAPES:
            raise ValueError(f"The shape takes one of {', '.join(SHAPES)}.")
        check_whole("number of the shape", self.number, 0, MOST_NUMBER)

    def load(self) -> Tensor:
        """(NUM_POINTS, 3), of unit radius."""
        from trimtab.recipes.point_clouds import draw_cloud

        return draw_cloud(self.name, self.number, NUM_POINTS, test=True)

    def code(self) -> Raw:
        """The call that draws it."""
        return Raw(call("draw_cloud", self.name, self.number, NUM_POINTS, test=True))


@dataclass(frozen=True)
class Upload:
    """A file that somebody uploaded.

    Attributes:
        path: its ending says what it is to be.
        largest: megabytes.
    """

    path: str
    largest: int

    def load(self) -> Tensor:
        """Its points, at most NUM_POINTS, (N, 3).

        Raises:
            ValueError: it cannot be used; the message does not name the path.
        """
        from trimtab.geometry import load_point_cloud

        path = Path(self.path)
        if path.suffix.lower() not in ENDINGS:
            raise ValueError(f"This file is no cloud or mesh that can be read; {', '.join(ENDINGS)} work.")
        if path.stat().st_size > self.largest * 1_000_000:
            raise ValueError(f"This file is larger than {self.largest} MB, the limit here.")
        try:
            _check_archive(path)
            return load_point_cloud(path, num_points=NUM_POINTS)
        except (ValueError, TypeError, MemoryError, RecursionError, OverflowError, zipfile.BadZipFile) as error:
            reason = (next(iter(str(error).splitlines()), "") or type(error).__name__).split(str(path))[-1]
            raise ValueError(f"This file cannot be used: {reason.strip(': ')[:200]}") from None

    def code(self) -> str:
        """Its name."""
        return Path(self.path).name


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Refuses an archive that unpacks to more than memory is for."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _UNPACKED:
                raise ValueError("it unpacks to more than can be read here")
