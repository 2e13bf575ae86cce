"""The Improve tab: noise moved until a reward likes the picture, watched while it happens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr
import numpy as np

from .chart import curve_svg
from .improve_job import Improved, ImproveJob, python_code
from .limits import BUNDLED
from .metadata import made_by, plain_settings
from .tab import Studio, Tab, seed_input
from .taste_file import FEATURES, TASTE, TasteFile
from .words import in_plain_words, status_html

__all__ = ["ID", "TITLE", "build_tab", "python_code"]

ID = "improve"
TITLE = "Improve"

EXAMPLES = [
    "three cars on a mint background",
    "a cat to the left of an owl on a sky background",
    "two red hearts on a mint background",
    "a panda above a star on a lavender background",
]
_ABOUT = """The noise that a picture begins from is moved until a reward likes the picture better
([ReNO](https://arxiv.org/abs/2406.04312)). Each point of the curve is a picture."""
_NAMES = {
    "bundled": "Fits the prompt (bundled)",
    "clip": "Fits the prompt (CLIP)",
    "pickscore": "What people pick (PickScore)",
    "hpsv2.1": "What people prefer (HPSv2.1)",
    "imagereward": "What people prefer (ImageReward)",
    "aesthetic": "Aesthetics",
    "reno": "The paper's mix of four",
    TASTE: "My own taste",
}


def build_tab(studio: Studio) -> Tab:
    """Makes the components and the events."""
    choices = [(_NAMES.get(name, name), name) for name in (*studio.limits.rewards, TASTE)]
    features = tuple(name for name in FEATURES if name in studio.limits.rewards)
    with gr.Row(elem_classes="tab-grid", equal_height=False):
        with gr.Column(elem_classes="part-ask"):
            gr.Markdown(_ABOUT)
            prompt = gr.Textbox(
                EXAMPLES[0], label="Prompt", info="What the picture shows", lines=2, max_lines=4, max_length=1000,
                elem_id="improve-prompt",
            )  # fmt: skip
            gr.Examples([[text] for text in EXAMPLES], [prompt], label="Or one of these", elem_id="improve-examples")
            with gr.Row(elem_classes="buttons"):
                start = gr.Button("Improve", variant="primary", min_width=100, elem_id="improve-run")
                stop = gr.Button("Stop", min_width=60, elem_id="improve-stop")
        with gr.Column(elem_classes="part-result"):
            status = studio.status(ID, "Ready. Stop when you like the picture: the best one is kept.")
            with gr.Row():
                best = gr.Image(
                    label="Best so far", type="pil", format="png", interactive=False, height=330, min_width=240,
                    buttons=["fullscreen"], elem_id="improve-best",
                )  # fmt: skip
                compare = gr.ImageSlider(
                    label="First | best", type="pil", format="png", interactive=False, height=330,
                    max_height=330, min_width=240, buttons=["fullscreen"], elem_id="improve-compare",
                )  # fmt: skip
            curve = gr.HTML(_curve(Improved()), label="Reward", elem_id="improve-curve", elem_classes="curve")
            strip = gr.Gallery(
                label="Improvements", columns=6, height=190, object_fit="contain", type="pil", format="png",
                interactive=False, buttons=["fullscreen"], elem_id="improve-strip", elem_classes="strip",
            )  # fmt: skip
            with gr.Row(elem_classes="tools") as send_row:
                picture_file = gr.DownloadButton("Download", size="sm", interactive=False, elem_id="improve-png")
                report_file = gr.DownloadButton(
                    "Download figures", size="sm", interactive=False, elem_id="improve-json"
                )
            with gr.Accordion("Copy as Python", open=False, elem_id="improve-python"):
                code = gr.Code(language="python", label="The code that makes this picture", interactive=False)
        with gr.Column(elem_classes="part-settings"):
            reward = gr.Dropdown(
                choices, value="bundled", label="Reward", info="What the search climbs", elem_id="improve-reward"
            )
            iterations = gr.Slider(
                1, 100, 20, step=1, label="Iterations", info="Pictures made on the way", elem_id="improve-iterations"
            )
            seed = seed_input("improve-seed", 3)
            with gr.Accordion("My own taste", open=False, elem_id="improve-my-taste"):
                gr.Markdown("Choose pictures in the Taste tab, or give the file that you downloaded there.")
                taste = gr.File(
                    label="taste.safetensors", file_types=[".safetensors"], type="filepath", height=110,
                    elem_id="improve-taste",
                )  # fmt: skip
            with gr.Accordion("Colours too", open=False):
                palette = gr.Textbox(
                    "", label="Colours", info="With commas between them, such as pink, #ffd1dc", max_length=200
                )
                palette_weight = gr.Slider(0.0, 20.0, 0.0, step=0.1, label="Weight of the colours", info="0 is off")
                reward_weight = gr.Slider(0.0, 5.0, 1.0, step=0.05, label="Weight of the reward")
            with gr.Accordion("More settings", open=False):
                negative_prompt = gr.Textbox("", label="Negative prompt", max_length=1000)
                optimizer = gr.Radio(
                    [("Follow the gradient", "gradient"), ("Fresh noise each time", "best-of-n")],
                    value="gradient", label="Search",
                )  # fmt: skip
                learning_rate = gr.Slider(0.5, 20.0, 5.0, step=0.5, label="Step of the gradient")
                few_steps = gr.Checkbox(
                    True, label="Fast: the bundled model in four steps", visible=BUNDLED in studio.limits.models,
                    info="Its transformer, distilled from twenty guided steps", elem_id="improve-fast",
                )  # fmt: skip
                steps = gr.Slider(
                    1, 50, 8, step=1, label="Steps of the sampler", info="Where it is not fast", elem_id="improve-steps"
                )
                guidance_scale = gr.Slider(
                    0.0, 20.0, 5.0, step=0.1, label="Guidance scale", info="Where it is not fast"
                )

    @in_plain_words
    def improve(
        prompt: str,
        reward: str,
        reward_weight: float,
        palette: str,
        palette_weight: float,
        iterations: int,
        seed: int,
        negative_prompt: str,
        optimizer: str,
        learning_rate: float,
        steps: int,
        guidance_scale: float,
        few_steps: bool,
        taste: str | None = None,
        model: str = BUNDLED,
        request: gr.Request | None = None,
    ) -> Iterator[tuple[Any, ...]]:
        """Moves the noise of a picture until a reward likes it; gives the best so far after each iteration.

        With the reward "taste" it climbs the personal reward in the file ``taste``.
        """
        job = ImproveJob(
            prompt=prompt,
            negative_prompt=negative_prompt,
            reward=_allowed(reward, choices),
            reward_weight=reward_weight,
            palette=palette,
            palette_weight=palette_weight,
            optimizer=optimizer,
            iterations=_whole(iterations),
            learning_rate=learning_rate,
            steps=_whole(steps),
            guidance_scale=guidance_scale,
            few_steps=few_steps,
            seed=_whole(seed),
            taste=TasteFile(taste, features) if taste else None,
            model=model,
        )
        nothing = gr.skip()
        yield None, None, _curve(Improved()), [], _no_file(), _no_file(), "", status_html("Waiting")
        last: Improved | None = None
        for update in studio.stream(job, request, ID):
            last = update.result
            text = " ".join(part for part in (update.note, last.notes if last else "") if part)
            if not update.new and not update.finished:
                yield *([nothing] * 7), status_html(text)
            elif last is not None:
                yield *_shown(last), nothing, nothing, nothing, status_html(text)
        if last is None or last.best is None:
            yield *([nothing] * 7), status_html(update.note)
            return
        done = replace(job, iterations=len(last.rewards))
        yield *_shown(last), *_files(studio, done, last), python_code(done), status_html(_told(update.note, last))

    inputs = [
        prompt, reward, reward_weight, palette, palette_weight, iterations, seed, negative_prompt, optimizer,
        learning_rate, steps, guidance_scale, few_steps, taste,
    ]  # fmt: skip
    outputs = [best, compare, curve, strip, picture_file, report_file, code, status]
    studio.on_run(ID, [start.click, prompt.submit], improve, inputs, outputs, api_name="improve", status=status)
    studio.stop_button(ID, stop)
    names = (
        "prompt", "reward", "reward_weight", "palette", "palette_weight", "iterations", "seed", "negative_prompt",
        "optimizer", "learning_rate", "steps", "guidance_scale", "few_steps",
    )  # fmt: skip
    settings = dict(zip(names, inputs, strict=False))
    return Tab(settings=settings, gives=best, send_row=send_row, job=ImproveJob, takes_taste=(reward, taste))


def _curve(made: Improved) -> str:
    """The reward of each picture, and the best so far."""
    best = np.fmax.accumulate(made.rewards).tolist() if made.rewards else []
    return curve_svg({"each picture": made.rewards, "best so far": best}, "iteration", "reward")


def _shown(made: Improved) -> tuple[Any, ...]:
    """What the picture, the slider, the curve and the strip show."""
    best = made.best or made.preview
    both = (made.first, made.best) if made.first is not None else None
    strip = [(picture, f"{step}: {reward:.3g}") for step, reward, picture in made.kept]
    return best, both, _curve(made), strip


def _files(studio: Studio, job: ImproveJob, made: Improved) -> tuple[Any, Any]:
    settings = plain_settings(job)
    picture = studio.files.png(made.best, f"{job.prompt} improved seed {job.seed}", made_by(ID, settings))
    rewards = [value if math.isfinite(value) else None for value in made.rewards]
    report = {
        "settings": settings,
        "best_step": made.best_step,
        "rewards": rewards,
        "terms": {
            name: [value if math.isfinite(value) else None for value in term] for name, term in made.terms.items()
        },
    }
    figures = studio.files.json(report, f"{job.prompt} rewards seed {job.seed}")
    return tuple(gr.DownloadButton(value=file, interactive=True) for file in (picture, figures))


def _no_file() -> Any:
    return gr.DownloadButton(value=None, interactive=False)


def _told(note: str, made: Improved) -> str:
    first, best = made.rewards[0], made.rewards[made.best_step]
    gain = f"Reward {first:.4g} at first, {best:.4g} at iteration {made.best_step}."
    return " ".join(part for part in (note, gain, made.notes) if part)


def _allowed(reward: str, choices: list[tuple[str, str]]) -> str:
    names = [name for _, name in choices]
    if reward not in names:
        raise ValueError(f"The reward takes one of {', '.join(names)}.")
    return reward


def _whole(value: Any) -> Any:
    """A slider's number as a whole one, where it is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
