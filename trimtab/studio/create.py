"""The Create tab: a prompt under plain guidance and under another rule, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from .create_job import Created, CreateJob, python_code, rule_names
from .metadata import made_by, plain_settings
from .tab import Studio, Tab, seed_input
from .words import in_plain_words, status_html

__all__ = ["ID", "TITLE", "build_tab", "python_code"]

ID = "create"
TITLE = "Create"

_LABELS = {
    "apg": "APG: keeps colours tame",
    "autoguidance": "AutoGuidance: away from a weaker model",
    "cfg": "CFG: plain guidance",
    "cfg++": "CFG++: a share, 0 to 1",
    "cfg-zero": "CFG-Zero*: scaled, silent at first",
    "fdg": "FDG: by frequency",
    "interval": "CFG at middle noise levels only",
    "mambo-g": "MAMBO-G: by magnitude",
    "pag": "PAG: away from perturbed attention",
    "rescale": "CFG, rescaled",
    "seg": "SEG: away from smoothed attention",
    "slg": "SLG: away from skipped layers",
    "tcfg": "TCFG: along the tangent",
}

EXAMPLES = [
    "a panda on a lavender background",
    "a cat to the left of an owl on a sky background",
    "three strawberries on a mint background",
    "two red hearts on a pink background",
]


def build_tab(studio: Studio) -> Tab:
    """Makes the components and the events."""
    with gr.Row(elem_classes="tab-grid", equal_height=False):
        with gr.Column(elem_classes="part-ask"):
            prompt = gr.Textbox(
                EXAMPLES[0], label="Prompt", info="What the picture shows", lines=2, max_lines=4, max_length=1000,
                elem_id="create-prompt",
            )  # fmt: skip
            gr.Examples([[text] for text in EXAMPLES], [prompt], label="Or one of these", elem_id="create-examples")
            with gr.Row(elem_classes="buttons"):
                start = gr.Button("Make the picture", variant="primary", min_width=100, elem_id="create-run")
                stop = gr.Button("Stop", min_width=60, elem_id="create-stop")
        with gr.Column(elem_classes="part-result"):
            status = studio.status(ID, "Ready. The model is loaded when you first use it, which takes some seconds.")
            slider = gr.ImageSlider(
                label="Plain guidance | chosen rule", type="pil", format="png",
                interactive=False, max_height=460, buttons=["fullscreen"], elem_id="create-slider",
            )  # fmt: skip
            facts = gr.Markdown(elem_id="create-facts", elem_classes="facts")
            picture = gr.Image(visible=False, type="pil", format="png")
            with gr.Row(elem_classes="tools") as send_row:
                download = gr.DownloadButton("Download", size="sm", interactive=False, elem_id="create-png")
            with gr.Accordion("Compare scales", open=False, elem_id="create-compare"):
                compare = gr.Button("Make a picture at each of some scales", elem_id="create-grid-run")
                gr.Markdown("First plain guidance, then the chosen rule. The second number is the saturation.")
                grid = gr.Gallery(
                    label="Grid over scales", show_label=False, columns=5, height="auto", object_fit="contain",
                    type="pil", format="png", interactive=False, buttons=["fullscreen"], elem_id="create-grid",
                )  # fmt: skip
            with gr.Accordion("Copy as Python", open=False, elem_id="create-python"):
                code = gr.Code(language="python", label="The code that makes this picture", interactive=False)
        with gr.Column(elem_classes="part-settings"):
            guidance = gr.Dropdown(
                [(_LABELS.get(name, name.upper()), name) for name in rule_names()], value="apg", label="Guidance rule",
                info="How the prompt steers; plain guidance is made beside it", elem_id="create-guidance",
            )  # fmt: skip
            guidance_scale = gr.Slider(
                0, 30, 15, step=0.1, label="Guidance scale", info="How strongly; too much burns a picture",
                elem_id="create-scale",
            )  # fmt: skip
            seed = seed_input("create-seed")
            steps = gr.Slider(1, 100, 20, step=1, label="Steps", info="More are slower", elem_id="create-steps")
            negative_prompt = gr.Textbox("", label="Negative prompt", info="What to keep away from", max_length=1000)

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
                python_code(job, last.arguments),
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
            cells = [(image, f"{label} · {figure:.2f}") for label, image, figure in made.pictures]
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
    settings = dict(zip(names, inputs, strict=True))
    return Tab(settings=settings, gives=picture, send_row=send_row, job=CreateJob)


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
    sides = zip(("Left", "Right"), made.pictures[:1] + made.pictures[1:][-1:], strict=False)
    return " · ".join(f"{side}: **{label}**, saturation {figure:.3f}" for side, (label, _, figure) in sides)
