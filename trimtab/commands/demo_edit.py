"""The part of ``trimtab demo`` that edits a picture drawn by hand."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.commands.edit import strip
from trimtab.commands.pictures import save_png

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["demo_edit", "drawn_picture"]

SOURCE_PROMPT = "a red circle on a sky background"
PROMPT = "a green circle on a sky background"
ITERATIONS = 6


def demo_edit(pipe: Any, folder: Path) -> Path:
    """Edits the drawn picture and writes ``edit.png``: before, every iterate, after.

    Args:
        pipe: a stock pipeline.
        folder: where to; it exists.

    Returns:
        The file.
    """
    from trimtab.commands.edit import as_picture, sequence_length
    from trimtab.pipelines import FlowOptPipeline

    picture = drawn_picture()
    edit = FlowOptPipeline.from_pipe(pipe)
    edit.set_progress_bar_config(disable=True)
    result = edit(
        picture,
        PROMPT,
        SOURCE_PROMPT,
        num_optimization_steps=ITERATIONS,
        keep_history=True,
        output_type="latent",
        **sequence_length(edit),
    )
    pictures = [as_picture(state.images[0]) for state in result.history]
    before = picture.resize(pictures[0].size)
    labels = ["before", *(f"iterate {k}" for k in range(len(pictures) - 1)), f"after: iterate {len(pictures) - 1}"]
    path = folder / "edit.png"
    made_by = {"source_prompt": SOURCE_PROMPT, "prompt": PROMPT}
    save_png(strip([before, *pictures], labels, marked=len(pictures)), path, made_by)
    return path


def drawn_picture() -> "Image":
    """A red ball on a blue sky, drawn with ellipses, at four times its size: none of the model's own sprites."""
    from PIL import Image, ImageDraw

    scale, side = 4, 128
    image = Image.new("RGB", (side * scale, side * scale))
    draw = ImageDraw.Draw(image)
    for y in range(side * scale):
        shade = y / (side * scale) - 0.5
        draw.line((0, y, side * scale, y), fill=tuple(round(value + 16 * shade) for value in (158, 208, 246)))
    for inset, fill in ((0, (196, 30, 40)), (5, (224, 40, 46)), (22, (232, 58, 60))):
        box = (34 + inset / 2, 38 + inset / 2, 95 - inset, 99 - inset)
        draw.ellipse([value * scale for value in box], fill=fill)
    return image.resize((side, side), Image.Resampling.LANCZOS)
