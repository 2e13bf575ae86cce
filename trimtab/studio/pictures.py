"""Pictures that come in, looked at by content, and files that go out."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from trimtab.commands.pictures import save_png, slug, write_json

from .metadata import with_comments

__all__ = ["Files", "Picture", "scaled_within"]

_KEPT = 24 * 3600
"""Seconds after which the folder of a download is removed."""


class Picture(gr.Image):
    """A ``gr.Image`` whose uploads are opened by content, upright and in RGB; the value is a PIL picture.

    What is no picture is refused in plain words, whatever its name. The arguments are those of ``gr.Image``, of which
    ``type`` means nothing here. It has no ``__init__`` of its own: from its signature gradio reads what the page needs.
    """

    def preprocess(self, payload: Any) -> Image.Image | None:
        from trimtab.pipelines.images import load_image

        if payload is None:
            return None
        if not payload.path:
            raise gr.Error("Send the picture as a file.", print_exception=False)
        try:
            return load_image(Path(payload.path))
        except (ValueError, MemoryError, OverflowError) as error:
            reason = "it is too large" if "too large" in str(error) else "it may be damaged, or something else"
            raise gr.Error(
                f"This file is no picture that can be read: {reason}. PNG, JPEG and WebP work.",
                duration=10,
                print_exception=False,
            ) from None

    def get_block_name(self) -> str:
        return "image"


def scaled_within(image: Image.Image, largest: int) -> tuple[Image.Image, str]:
    """A picture no larger than the limit, and a notice if it was scaled.

    Args:
        image: any size.
        largest: longest side in pixels.

    Example:
        >>> scaled_within(Image.new("RGB", (300, 100)), 150)[1]
        'Your picture was scaled from 300 x 100 to 150 x 50 pixels, the limit here.'
    """
    width, height = image.size
    if max(image.size) <= largest:
        return image, ""
    scale = largest / max(image.size)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    notice = f"Your picture was scaled from {width} x {height} to {size[0]} x {size[1]} pixels, the limit here."
    return image.resize(size, Image.Resampling.LANCZOS), notice


class Files:
    """Files for download, each in a folder of its own inside one temporary folder, so that names can be friendly.

    Attributes:
        folder: the temporary folder; taken away at the end and, of what is old, now and then.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="trimtab-app-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def png(self, image: Image.Image, name: str, made_by: Mapping[str, Any]) -> str:
        """Writes a picture with its settings in it; the name may have any characters."""
        path = self._place(name, "png")
        save_png(image, path, made_by)
        return str(path)

    def json(self, content: Mapping[str, Any], name: str) -> str:
        """Writes a JSON file."""
        path = self._place(name, "json")
        write_json(path, content)
        return str(path)

    def cloud(self, cloud: Any, name: str, made_by: Mapping[str, Any]) -> str:
        """Writes a point cloud (N, 3) as PLY with its settings in it."""
        from trimtab.geometry import save_point_cloud

        path = self._place(name, "ply")
        save_point_cloud(cloud, path)
        path.write_bytes(with_comments(path.read_bytes(), made_by))
        return str(path)

    def taste(self, reward: Any) -> str:
        """Writes a personal reward as taste.safetensors."""
        return str(reward.save(self._place("taste", "safetensors")))

    def content(self, content: bytes, name: str, ending: str) -> str:
        """Writes any content."""
        path = self._place(name, ending)
        path.write_bytes(content)
        return str(path)

    def _place(self, name: str, ending: str) -> Path:
        self._forget_old()
        folder = self.folder / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder / f"{slug(name)}.{ending}"

    def _forget_old(self) -> None:
        now = time.time()
        for folder in self.folder.glob("*"):
            if folder.is_dir() and now - folder.stat().st_mtime > _KEPT:
                shutil.rmtree(folder, ignore_errors=True)
