"""The Edit tab: a picture and two prompts, every iterate as it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr
from PIL import Image

from .edit_inputs import build_painter, examples
from .edit_job import BLENDS, METHODS, Edited, EditJob, python_code
from .limits import BUNDLED
from .metadata import made_by, plain_settings
from .pictures import Picture, scaled_within
from .tab import Studio, Tab
from .words import in_plain_words, status_html

__all__ = ["ID", "TITLE", "build_tab", "python_code"]

ID = "edit"
TITLE = "Edit"

_LABELS = {
    "flowopt": "FlowOpt: closer with each iterate",
    "flowedit": "FlowEdit: without an inversion",
    "sdedit": "SDEdit: noise, and back",
    "ode-inversion": "Inversion, and back",
    "uni-inv": "Uni-Inv",
    "rf-inversion": "RF-Inversion: steered both ways",
    "rf-solver": "RF-Solver: midpoint rule",
    "fireflow": "FireFlow: midpoint at one call a step",
}
_BLENDS = {
    "feather": "A soft edge",
    "poisson": "Seamless: the part takes on the colours around it (Poisson)",
    "poisson-mixed": "Seamless, and details of the old picture stay where they are stronger",
    "none": "A hard edge",
}


def build_tab(studio: Studio) -> Tab:
    """Makes the components and the events."""
    shown = examples()
    with gr.Row(elem_classes="tab-grid", equal_height=False):
        with gr.Column(elem_classes="part-ask"):
            image = Picture(
                label="Picture", format="png", height=240, sources=["upload", "clipboard"], elem_id="edit-image",
            )  # fmt: skip
            pick = gr.Gallery(
                [(one.image, one.label) for one in shown], label="Or one of these", show_label=False, columns=4,
                height=112, object_fit="cover", allow_preview=False, interactive=False, type="pil", format="png",
                buttons=[], elem_id="edit-examples",
            )  # fmt: skip
            source_prompt = gr.Textbox(
                "",
                label="What it shows",
                placeholder="a cat on a pink background",
                max_length=1000,
                elem_id="edit-source",
            )
            prompt = gr.Textbox(
                "",
                label="What it is to show",
                placeholder="a panda on a pink background",
                max_length=1000,
                elem_id="edit-prompt",
            )
            with gr.Row(elem_classes="buttons"):
                start = gr.Button("Edit", variant="primary", min_width=100, elem_id="edit-run")
                stop = gr.Button("Stop", min_width=60, elem_id="edit-stop")
        with gr.Column(elem_classes="part-result"):
            status = studio.status(ID, "Ready. Each iterate is shown as it comes; stop when you like it.")
            slider = gr.ImageSlider(
                label="Before | after", type="pil", format="png", interactive=False, max_height=420,
                buttons=["fullscreen"], elem_id="edit-slider",
            )  # fmt: skip
            strip = gr.Gallery(
                label="Iterates, from the freest to the closest", columns=6, height=190, object_fit="contain",
                type="pil", format="png", interactive=False, buttons=["fullscreen"], elem_id="edit-strip",
                elem_classes="strip",
            )  # fmt: skip
            chosen = gr.Slider(
                0, 1, 0, step=1, label="Iterate", info="The one to keep: to show above, download, send and copy",
                interactive=True, visible=False, elem_id="edit-chosen",
            )  # fmt: skip
            picture = gr.Image(visible=False, type="pil", format="png")
            iterates = gr.State()
            with gr.Row(elem_classes="tools") as send_row:
                download = gr.DownloadButton("Download", size="sm", interactive=False, elem_id="edit-png")
            with gr.Accordion("Copy as Python", open=False, elem_id="edit-python"):
                code = gr.Code(language="python", label="The code that makes this iterate", interactive=False)
        with gr.Column(elem_classes="part-settings"):
            strength = gr.Slider(
                0.05, 1, 0.8, step=0.05, label="Strength", info="How much may change at all", elem_id="edit-strength"
            )
            iterations = gr.Slider(
                0, 50, 8, step=1, label="Iterations", info="More come closer to the picture", elem_id="edit-iterations"
            )
            with gr.Accordion("Change a part only", open=False, elem_id="edit-part"):
                mask = build_painter(image)
                blend = gr.Radio(
                    [(_BLENDS[name], name) for name in BLENDS], value="feather", label="At the edge of the part",
                    info="How the new part is set into the picture", elem_id="edit-blend",
                )  # fmt: skip
            with gr.Accordion("More settings", open=False, elem_id="edit-more"):
                method = gr.Dropdown(
                    [(_LABELS[name], name) for name in METHODS], value="flowopt", label="Method", elem_id="edit-method"
                )
                guidance_scale = gr.Slider(0, 30, 3.5, step=0.1, label="Guidance scale", info="Of the new prompt")
                steps = gr.Slider(1, 100, 15, step=1, label="Steps", info="More are slower", elem_id="edit-steps")

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
        blend: str = "feather",
        model: str = BUNDLED,
        request: gr.Request | None = None,
    ) -> Iterator[tuple[Any, ...]]:
        """Edits a picture from what it shows to what it is to show; gives every iterate."""
        notice = ""
        if image is not None:
            image, notice = scaled_within(image, studio.limits.largest_picture)
            mask = scaled_within(mask, studio.limits.largest_picture)[0] if mask is not None else None
        job = EditJob(
            image, source_prompt, prompt, mask, method, strength, guidance_scale, int(steps), int(iterations), blend,
            model,
        )  # fmt: skip
        skip, last = gr.skip(), Edited()
        for update in studio.stream(job, request, ID):
            last = update.result or last
            text = status_html(" ".join(filter(None, (update.note, notice, last.notes))))
            if update.new:
                yield _both(last), _strip(last), skip, skip, skip, skip, skip, text
            else:
                yield *[skip] * 7, text
        if last.iterates:
            at, most = len(last.iterates) - 1, max(1, len(last.iterates) - 1)
            number = gr.Slider(maximum=most, value=at, visible=len(last.iterates) > 1)
            yield _both(last), _strip(last), number, *_kept(last, job, at), text

    def _kept(made: Edited, job: EditJob, number: int) -> tuple[Any, ...]:
        """The picture, the state, the download and the code of an iterate."""
        done = replace(job, iterations=number) if job.method == "flowopt" else job
        image = made.iterates[number]
        file = studio.files.png(image, f"{job.prompt} iterate {number}", made_by(ID, plain_settings(done)))
        return image, (made, job), gr.DownloadButton(value=file, interactive=True), python_code(done)

    @in_plain_words
    def choose(number: int, kept: tuple[Edited, EditJob] | None) -> tuple[Any, ...]:
        if kept is None or not 0 <= number < len(kept[0].iterates):
            return (gr.skip(),) * 5
        return (kept[0].source, kept[0].iterates[int(number)]), *_kept(*kept, int(number))

    def pick_iterate(event: gr.SelectData) -> int:
        return event.index

    def pick_example(event: gr.SelectData) -> tuple[Any, ...]:
        one = shown[event.index]
        return one.image, one.source_prompt, one.prompt

    inputs = [image, source_prompt, prompt, mask, method, strength, guidance_scale, steps, iterations, blend]
    outputs = [slider, strip, chosen, picture, iterates, download, code, status]
    studio.on_run(ID, [start.click, prompt.submit], edit, inputs, outputs, api_name="edit", status=status)
    studio.stop_button(ID, stop)
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    chosen.change(choose, [chosen, iterates], [slider, picture, iterates, download, code], **quiet)
    strip.select(pick_iterate, None, [chosen], **quiet)
    pick.select(pick_example, None, [image, source_prompt, prompt], **quiet)
    settings = {
        "source_prompt": source_prompt,
        "prompt": prompt,
        "method": method,
        "strength": strength,
        "guidance_scale": guidance_scale,
        "steps": steps,
        "iterations": iterations,
        "blend": blend,
    }
    return Tab(settings=settings, takes=image, gives=picture, send_row=send_row, job=EditJob)


def _both(made: Edited) -> Any:
    """Before and after: the last iterate, or what it will be."""
    after = made.preview or (made.iterates[-1] if made.iterates else made.source)
    return (made.source, after) if made.source is not None else None


def _strip(made: Edited) -> list[tuple[Image.Image, str]]:
    return [(image, f"iterate {number}") for number, image in enumerate(made.iterates)]
