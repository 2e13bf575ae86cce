"""The Edit tab: a picture and two prompts, every iterate as it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr
from PIL import Image

from .edit_job import METHODS, Edited, EditJob, python_code
from .metadata import made_by, plain_settings
from .pictures import Picture, scaled_within
from .tab import Studio, Tab
from .words import in_plain_words, status_html

__all__ = ["ID", "TITLE", "build_tab", "python_code"]

ID = "edit"
TITLE = "Edit"

SOURCE, TARGET = "a red circle on a sky background", "a green circle on a sky background"


def build_tab(studio: Studio) -> Tab:
    """Makes the components and the events."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            image = Picture(
                label="Picture", format="png", height=240, sources=["upload", "clipboard"], elem_id="edit-image"
            )
            example = gr.Button("Use the example", size="sm", elem_id="edit-example")
            source_prompt = gr.Textbox("", label="What it shows", max_length=1000, elem_id="edit-source")
            prompt = gr.Textbox("", label="What it is to show", max_length=1000, elem_id="edit-prompt")
            strength = gr.Slider(0.05, 1, 0.8, step=0.05, label="Strength", info="How much may change at all")
            with gr.Accordion("More settings", open=False):
                mask = Picture(label="Mask, white where it may change", format="png", height=160, elem_id="edit-mask")
                method = gr.Dropdown([(name, name) for name in METHODS], value="flowopt", label="Method")
                guidance_scale = gr.Slider(0, 30, 3.5, step=0.1, label="Guidance scale")
                steps = gr.Slider(1, 100, 15, step=1, label="Steps")
                iterations = gr.Slider(0, 50, 8, step=1, label="Iterations", info="More come closer to the picture")
            with gr.Row():
                start = gr.Button("Edit", variant="primary", elem_id="edit-run")
                stop = gr.Button("Stop, keep this one", elem_id="edit-stop")
        with gr.Column(scale=3, min_width=300):
            status = studio.status(ID, "Ready.")
            slider = gr.ImageSlider(
                label="Before and after", type="pil", format="png", interactive=False, max_height=420,
                buttons=["fullscreen"], elem_id="edit-slider",
            )  # fmt: skip
            strip = gr.Gallery(
                label="Iterates, from the freest to the closest", columns=6, height=190, object_fit="contain",
                type="pil", format="png", interactive=False, elem_id="edit-strip",
            )  # fmt: skip
            chosen = gr.Slider(0, 1, 0, step=1, label="Iterate", interactive=True, visible=False, elem_id="edit-chosen")
            picture = gr.Image(visible=False, type="pil", format="png")
            iterates = gr.State(Edited())
            send_row = gr.Row()
            download = gr.DownloadButton("Download the picture", interactive=False, elem_id="edit-png")
            with gr.Accordion("Copy as Python", open=False):
                code = gr.Code(language="python", label="The code that makes the last iterate", interactive=False)

    @in_plain_words
    def edit(
        image: Image.Image | None,
        source_prompt: str,
        prompt: str,
        mask: Image.Image | None,
        method: str,
        strength: float,
        guidance_scale: float,
        steps: int,
        iterations: int,
        model: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Edits a picture from what it shows to what it is to show; gives every iterate."""
        notice = ""
        if image is not None:
            image, notice = scaled_within(image, studio.limits.largest_picture)
            mask = scaled_within(mask, studio.limits.largest_picture)[0] if mask is not None else None
        job = EditJob(
            image, source_prompt, prompt, mask, method, strength, guidance_scale, int(steps), int(iterations), model
        )
        skip, last = gr.skip(), Edited()
        for update in studio.stream(job, request, ID):
            last = update.result or last
            text = status_html(" ".join(filter(None, (update.note, notice, last.notes))))
            if update.new:
                yield _both(last), _strip(last), skip, skip, skip, skip, skip, text
            else:
                yield *[skip] * 7, text
        if last.iterates:
            done = replace(job, iterations=len(last.iterates) - 1) if method == "flowopt" else job
            made = last.iterates[-1]
            file = studio.files.png(made, f"{prompt} edited", made_by(ID, plain_settings(done)))
            at = gr.Slider(maximum=max(1, len(last.iterates) - 1), value=len(last.iterates) - 1, visible=True)
            button = gr.DownloadButton(value=file, interactive=True)
            yield _both(last), _strip(last), at, made, last, button, python_code(done), text

    @in_plain_words
    def choose(number: int, made: Edited, prompt: str) -> tuple[Any, ...]:
        if not 0 <= number < len(made.iterates):
            return gr.skip(), gr.skip(), gr.skip()
        image = made.iterates[int(number)]
        file = studio.files.png(image, f"{prompt} iterate {int(number)}", {"prompt": prompt})
        return (made.source, image), image, gr.DownloadButton(value=file, interactive=True)

    inputs = [image, source_prompt, prompt, mask, method, strength, guidance_scale, steps, iterations]
    outputs = [slider, strip, chosen, picture, iterates, download, code, status]
    studio.on_run(ID, [start.click, prompt.submit], edit, inputs, outputs, api_name="edit", status=status)
    studio.stop_button(ID, stop)
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    chosen.release(choose, [chosen, iterates, prompt], [slider, picture, download], **quiet)
    example.click(_example, None, [image, source_prompt, prompt], **quiet)
    settings = {
        "source_prompt": source_prompt,
        "prompt": prompt,
        "method": method,
        "strength": strength,
        "guidance_scale": guidance_scale,
        "steps": steps,
        "iterations": iterations,
    }
    return Tab(settings=settings, takes=image, gives=picture, send_row=send_row)


def _example() -> tuple[Any, ...]:
    from trimtab.commands.demo_edit import drawn_picture

    return drawn_picture(), SOURCE, TARGET


def _both(made: Edited) -> Any:
    """Before and after: the last iterate, or what it will be."""
    after = made.preview or (made.iterates[-1] if made.iterates else made.source)
    return (made.source, after) if made.source is not None else None


def _strip(made: Edited) -> list[tuple[Image.Image, str]]:
    return [(image, f"iterate {number}") for number, image in enumerate(made.iterates)]
