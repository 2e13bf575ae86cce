"""Pictures to begin with in the Edit tab, and the painter of masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from .pictures import Picture

__all__ = ["EditExample", "build_painter", "examples", "painted_mask"]

_CANVAS = 512
"""Longest side of what is painted on; a small picture is enlarged, so that a finger can paint on it."""
_BRUSH = "#6366f1"


@dataclass(frozen=True)
class EditExample:
    """A picture and two prompts.

    Attributes:
        image: RGB.
        source_prompt: what it shows.
        prompt: what it is to show.
        label: in a word.
    """

    image: Image.Image
    source_prompt: str
    prompt: str
    label: str


def examples() -> list[EditExample]:
    """Pictures in the bundled model's words: one drawn by hand, and scenes of its sprites."""
    from trimtab.commands.demo_edit import PROMPT, SOURCE_PROMPT, drawn_picture
    from trimtab.recipes.emoji_scenes import Scene, SceneObject

    def scene(*objects: SceneObject, background: str) -> Image.Image:
        pixels = Scene(objects, background).render()
        return Image.fromarray((pixels * 255).round().astype("uint8"))

    found = [EditExample(drawn_picture(), SOURCE_PROMPT, PROMPT, "Green")]
    for objects, background, source, target, label in _SCENES:
        image = scene(*(SceneObject(*one) for one in objects), background=background)
        found.append(EditExample(image, source, target, label))
    return found


_SCENES = (
    ((("cat", (32, 32, 64)),), "pink", "a cat on a pink background", "a panda on a pink background", "Panda"),
    (
        (("strawberry", (16, 48, 48)), ("strawberry", (64, 32, 48))), "mint",
        "two strawberries on a mint background", "two lemons on a mint background", "Lemons",
    ),
    ((("owl", (32, 32, 64)),), "sky", "an owl on a sky background", "an owl on a night background", "Night"),
)  # fmt: skip


def build_painter(image: gr.Image) -> Picture:
    """Makes the painter of a mask over a picture.

    Args:
        image: the component with the picture.

    Returns:
        The component with the mask, white where it may change; its value is None where nothing is painted.
    """
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    gr.Markdown("Paint where it may change; the rest stays as it is.")
    canvas = gr.ImageEditor(
        label="Paint where it may change", show_label=False, type="pil", image_mode="RGBA", format="png",
        sources=(), transforms=(), layers=False, height=340, canvas_size=(_CANVAS, _CANVAS), buttons=[],
        elem_id="edit-painter", eraser=gr.Eraser(default_size=48),
        brush=gr.Brush(default_size=48, colors=[_BRUSH], default_color=_BRUSH, color_mode="fixed"),
    )  # fmt: skip
    mask = Picture(
        label="Mask, white where it may change", format="png", height=160, sources=["upload"], elem_id="edit-mask"
    )
    image.change(_on_canvas, [image], [canvas, mask], **quiet)
    canvas.input(_painted, [canvas], [mask], trigger_mode="always_last", **quiet)
    return mask


def painted_mask(value: dict[str, Any] | None) -> Image.Image | None:
    """The mask of what was painted, white where there is paint; None where there is none.

    Args:
        value: of a ``gr.ImageEditor``, its layers PIL pictures.
    """
    layers = [layer for layer in (value or {}).get("layers") or [] if layer is not None]
    if not layers:
        return None
    mask = Image.new("L", layers[0].size)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A")
        mask.paste(255, mask=alpha.resize(mask.size).point(lambda value: 255 * (value > 127)))
    return mask.convert("RGB") if mask.getbbox() else None


def _on_canvas(image: Image.Image | None) -> tuple[Any, None]:
    if image is None:
        return None, None
    scale = _CANVAS / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return {"background": image.resize(size, Image.Resampling.LANCZOS), "layers": [], "composite": None}, None


def _painted(value: dict[str, Any] | None) -> Image.Image | None:
    return painted_mask(value)
