"""Pictures in gradio's cache are written whole or not at all.

The cache names a file by its content, so visitors who see the same picture share it. Gradio 6.31 writes it anew each
time, in place: whoever fetches it at that moment gets a part of it ("Too little data for declared Content-Length").
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from PIL import Image

__all__ = ["save_pil_to_cache", "write_whole"]


def write_whole() -> None:
    """Puts :func:`save_pil_to_cache` in the place of gradio's function of that name, for this process."""
    from gradio import processing_utils

    processing_utils.save_pil_to_cache = save_pil_to_cache


def save_pil_to_cache(img: Image.Image, cache_dir: str, name: str = "image", format: str = "webp") -> str:
    """Writes a picture into the cache, under a temporary name first, unless it is there.

    Args:
        img: the picture.
        cache_dir: the cache's folder.
        name: of the file, without its ending.
        format: by its name as an ending.

    Returns:
        The file's path.
    """
    from gradio import processing_utils

    content = processing_utils.encode_pil_to_bytes(img, format)
    folder = Path(cache_dir) / processing_utils.hash_bytes(content)
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / f"{name}.{format}").resolve()
    try:
        os.utime(path)  # the cache is cleared of what was not used for long
    except FileNotFoundError:
        handle, temporary = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    return str(path)
