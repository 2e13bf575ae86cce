"""The Create tab: a prompt under plain guidance and under another rule, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from .create_job import Created, CreateJob, python_code, rule_names
from .metadata import made_by, plain_settings
from .tab import Studio, Tab
from .words import in_plain_words, status_html

__all__ = ["ID", "TITLE", "build_tab", "python_code"]

ID = "create"
TITLE = "Create"

EXAMPLES = [
    "a cat to the left of an owl on a sky background",
    "three strawberries on a mint background",
    "a panda on a lavender background",
    "two red hearts on a pink background",
]


def build_tab(studio: Studio) -> Tab:
    """Makes the components and the events."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(
                EXAMPLES[0], label="Prompt", info="What the picture shows", lines=2, max_lines=4, max_length=1000,
                elem_id="create-prompt",
            )  # fmt: skip
            gr.Examples([[text] for text in EXAMPLES], [prompt], label="Examples", elem_id="create-examples")
            guidance = gr.Dropdown(
                [(name.upper(), name) for name in rule_names()], value="apg", label="Guidance rule",
                info="Plain guidance (CFG) is made beside it", elem_id="create-guidance",
            )  # fmt: skip
            guidance_scale = gr.Slider(
                0,
                30,
                10,
                step=0.1,
                label="Guidance scale",
                info="How strongly the prompt holds",
                elem_id="create-scale",
            )
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, info="The noise", elem_id="create-seed")
            steps = gr.Slider(1, 100, 20, step=1, label="Steps", elem_id="create-steps")
            with gr.Accordion("More settings", open=False):
                negative_prompt = gr.Textbox("", label="Negative prompt", max_length=1000)
            with gr.Row():
                start = gr.Button("Make the picture", variant="primary", elem_id="create-run")
                stop = gr.Button("Stop", elem_id="create-stop")
        with gr.Column(scale=3, min_width=300):
            status = studio.status(ID, "Ready. The model is loaded when it is first used.")
            slider = gr.ImageSlider(
                label="Plain guidance on the left, the chosen rule on the right", type="pil", format="png",
                interactive=False, max_height=460, buttons=["fullscreen"], elem_id="create-slider",
            )  # fmt: skip
            facts = gr.Markdown(elem_id="create-facts")
            picture = gr.Image(visible=False, type="pil", format="png")
            send_row = gr.Row()
            download = gr.DownloadButton("Download the picture", interactive=False, elem_id="create-png")
            with gr.Accordion("Compare scales", open=False):
                compare = gr.Button("Make a grid over scales", elem_id="create-grid-run")
                grid = gr.Gallery(
                    label="Grid over scales", columns=5, object_fit="contain", type="pil", format="png",
                    interactive=False, elem_id="create-grid",
                )  # fmt: skip
            with gr.Accordion("Copy as Python", open=False):
                code = gr.Code(language="python", label="The code that makes this picture", interactive=False)

    @in_plain_words
    def create(
        prompt: str,
        negative_prompt: str,
        guidance: str,
        guidance_scale: float,
        seed: int,
        steps: int,
        model: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Makes a picture under plain guidance and one under a guidance rule, from the same noise."""
        job = CreateJob(prompt, negative_prompt, guidance, guidance_scale, seed, int(steps), model=model)
        skip, last = gr.skip(), Created()
        for update in studio.stream(job, request, ID):
            last = update.result or last
            text = status_html(" ".join(filter(None, (update.note, last.notes))))
            if update.new:
                yield _both(last), _facts(last), skip, gr.DownloadButton(interactive=False), skip, text
            else:
                yield skip, skip, skip, skip, skip, text
        if len(last.pictures) >= 2:
            made = last.pictures[-1][1]
            file = studio.files.png(made, f"{prompt} seed {seed}", made_by(ID, plain_settings(job)))
            yield (
                _both(last),
                _facts(last),
                made,
                gr.DownloadButton(value=file, interactive=True),
                python_code(job),
                text,
            )

    @in_plain_words
    def create_grid(
        prompt: str,
        negative_prompt: str,
        guidance: str,
        seed: int,
        steps: int,
        model: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Makes a picture at each of some scales, under plain guidance and under a rule."""
        job = CreateJob(prompt, negative_prompt, guidance, 1.0, seed, int(steps), grid=True, model=model)
        for update in studio.stream(job, request, ID):
            made = update.result or Created()
            cells = [(image, f"{label}, saturation {figure:.2f}") for label, image, figure in made.pictures]
            yield cells if update.new or update.finished else gr.skip(), status_html(update.note)

    inputs = [prompt, negative_prompt, guidance, guidance_scale, seed, steps]
    outputs = [slider, facts, picture, download, code, status]
    studio.on_run(ID, [start.click, prompt.submit], create, inputs, outputs, api_name="create", status=status)
    studio.on_run(
        ID, compare.click, create_grid, [prompt, negative_prompt, guidance, seed, steps], [grid, status],
        api_name="create_grid", status=status,
    )  # fmt: skip
    studio.stop_button(ID, stop)
    guidance.input(_usual_scale, [guidance], [guidance_scale], api_visibility="private", show_progress="hidden")
    names = ("prompt", "negative_prompt", "guidance", "guidance_scale", "seed", "steps")
    return Tab(settings=dict(zip(names, inputs, strict=True)), gives=picture, send_row=send_row)


@in_plain_words
def _usual_scale(guidance: str) -> float:
    from trimtab.commands.sampling import check_guidance

    return check_guidance(guidance)


def _both(made: Created) -> Any:
    """What the slider shows: what there is, and the preview of what comes."""
    pictures = [image for _, image, _ in made.pictures]
    pictures += [made.preview] if made.preview is not None else []
    return (pictures[0], pictures[min(1, len(pictures) - 1)]) if pictures else None


def _facts(made: Created) -> str:
    return " · ".join(f"**{label}**: saturation {figure:.3f}" for label, _, figure in made.pictures)
