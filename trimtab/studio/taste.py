"""The Taste tab: two pictures at a time, the one that is liked, and a personal reward fitted from the choices."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from .checks import as_whole
from .code import device_of_code
from .limits import BUNDLED
from .tab import Studio, Tab, seed_input
from .taste_choice import SIDES, Ballot, told, undone, voted
from .taste_file import FEATURES, TasteFile
from .taste_job import (
    FEWEST_PICTURES,
    HEADS,
    MOST_PICTURES,
    Stock,
    TasteJob,
    fit_taste,
    python_code,
    scores_of,
    told_apart,
)
from .words import in_plain_words, status_html

__all__ = ["ID", "TITLE", "build_tab"]

ID = "taste"
TITLE = "Taste"

PROMPTS = """a panda on a lavender background
two red hearts on a pink background
an owl on a night background
three strawberries on a mint background
a rocket above a star on a sky background
a fox to the left of a tree on a sand background
four blue squares on a white background
a cat on a sky background
two pizzas on a lavender background
a turtle below a sunflower on a mint background
a green circle on a night background
a butterfly to the right of a rose on a pink background"""
_ABOUT = """Say which of two pictures you like more, some twenty times. From your choices a small network learns your
taste, which the Improve tab can then climb. It stays with you: nobody else gets it."""
_NAMES = {"bundled": "Bundled CLIP", "clip": "CLIP", "pickscore": "PickScore"}
_KINDS = {"polished": "A small network", "linear": "A linear one"}
_FIRST = 4
"""Pictures that must be there before the first pair is asked, so that a quick person need not wait."""
_LONGEST_KEPT = 3_000_000
"""Characters of what the browser keeps."""
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def build_tab(studio: Studio) -> Tab:
    """Makes the components and the events."""
    features_here = tuple(name for name in FEATURES if name in studio.limits.rewards)
    with gr.Row(elem_classes="tab-grid", equal_height=False):
        with gr.Column(elem_classes="part-ask"):
            gr.Markdown(_ABOUT)
            prompts = gr.Textbox(
                PROMPTS, label="Prompts", info="What the pictures show, a line each", lines=6, max_lines=12,
                max_length=4000, elem_id="taste-prompts",
            )  # fmt: skip
            with gr.Row(elem_classes="buttons"):
                start = gr.Button("Make pictures", variant="primary", min_width=100, elem_id="taste-run")
                stop = gr.Button("Stop", min_width=60, elem_id="taste-stop")
        with gr.Column(elem_classes="part-result"):
            status = studio.status(ID, "Ready. The first pair is there some seconds after you press Make pictures.")
            side = gr.Radio(list(SIDES), value="neither", label="Side", visible=False)
            shown, buttons, undo = _build_pair()
            facts = gr.HTML(status_html(""), label="Choices", show_label=False, padding=False, elem_id="taste-facts")
            learnt = gr.Markdown(elem_id="taste-learnt", elem_classes="facts")
            ranking = gr.Gallery(
                label="By your taste, what you like most first", columns=6, height=230, object_fit="contain",
                type="pil", format="png", interactive=False, buttons=["fullscreen"], elem_id="taste-ranking",
                elem_classes="strip",
            )  # fmt: skip
            with gr.Row(elem_classes="tools") as send_row:
                download = gr.DownloadButton("Download taste", size="sm", interactive=False, elem_id="taste-file")
                opened = gr.UploadButton(
                    "Open a taste", file_types=[".safetensors"], size="sm", elem_id="taste-open", type="filepath"
                )
                use = gr.Button("Use in Improve", size="sm", interactive=False, elem_id="taste-to-improve")
            with gr.Accordion("Copy as Python", open=False, elem_id="taste-python"):
                code = gr.Code(language="python", label="The code that fits this taste", interactive=False)
        with gr.Column(elem_classes="part-settings"):
            count = gr.Slider(
                FEWEST_PICTURES, MOST_PICTURES, 24, step=1, label="Pictures", info="To choose from",
                elem_id="taste-count",
            )  # fmt: skip
            seed = seed_input("taste-seed")
            with gr.Accordion("More settings", open=False, elem_id="taste-more"):
                head = gr.Radio(
                    [(_KINDS[name], name) for name in HEADS], value="polished", label="What learns",
                    info="A linear one knows no 'both' and no 'either'", elem_id="taste-head",
                )  # fmt: skip
                features = gr.Dropdown(
                    [(_NAMES[name], name) for name in features_here], value=BUNDLED, label="Features",
                    info="What it sees of a picture", visible=len(features_here) > 1, elem_id="taste-features",
                )  # fmt: skip
                few_steps = gr.Checkbox(
                    True, label="Fast: the bundled model in four steps", visible=BUNDLED in studio.limits.models,
                    elem_id="taste-fast",
                )  # fmt: skip
                steps = gr.Slider(1, 50, 8, step=1, label="Steps", info="Where it is not fast", elem_id="taste-steps")
                guidance_scale = gr.Slider(0, 20, 5, step=0.1, label="Guidance scale", info="Where it is not fast")
    stock, ballot, path, kept = gr.State(), gr.State(Ballot()), gr.State(""), studio.kept_taste

    @in_plain_words
    def make_pairs(
        prompts: str,
        count: int,
        seed: int,
        features: str,
        few_steps: bool,
        steps: int,
        guidance_scale: float,
        model: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Makes pictures to choose from; then /choose_picture gives pairs, and /fit_taste the reward."""
        if features not in features_here:
            raise ValueError(f"The features take one of {', '.join(features_here)}.")
        job = TasteJob(
            prompts, as_whole(count), as_whole(seed), features, few_steps, as_whole(steps), guidance_scale, model
        )
        skip, asked = gr.skip(), False
        yield None, Ballot(), None, None, status_html(""), [], status_html("Waiting")
        for update in studio.stream(job, request, ID):
            made, told_so_far = update.result, status_html(update.note)
            if not update.new or made is None:
                yield *[skip] * 6, told_so_far
            elif not asked and (len(made.pictures) >= min(_FIRST, job.count)):
                asked, first = True, voted(Ballot(), "neither", len(made.pictures), made.job.seed)
                yield made, first, *_pair(made, first), status_html(told(first)), skip, told_so_far
            else:
                yield made, *[skip] * 5, told_so_far
        notes = update.result.notes if update.result is not None else ""
        yield *[skip] * 6, status_html(" ".join(filter(None, (update.note, notes))))

    @in_plain_words
    def choose_picture(side: str, stock: Stock | None, ballot: Ballot, path: str) -> tuple[Any, ...]:
        """Says which of the two pictures is liked more, and gives the next two; "neither" gives others at once."""
        if stock is None or len(stock.pictures) < 2:
            raise ValueError("There are no pictures yet: press Make pictures.")
        taste = TasteFile(path, features_here) if path else None
        after = voted(ballot, side, len(stock.pictures), stock.job.seed, taste and scores_of(taste, stock))
        if after.pair is None:
            gr.Info("You have seen every pair of the pictures that are there. Make more of them to go on.")
        return after, *_pair(stock, after), status_html(told(after))

    @in_plain_words
    def take_back(stock: Stock | None, ballot: Ballot) -> tuple[Any, ...]:
        before = undone(ballot)
        return before, *_pair(stock, before), status_html(told(before))

    @in_plain_words
    def fit(stock: Stock | None, ballot: Ballot, head: str) -> tuple[Any, ...]:
        """Fits the personal reward to the choices so far; gives its file, and the pictures by it, the best first."""
        if stock is None:
            raise ValueError("There are no pictures yet: press Make pictures.")
        began = time.monotonic()
        reward = fit_taste(stock, ballot.votes, head)
        took = f"Fitted to {len(ballot.votes)} choices in {time.monotonic() - began:.1f} s."
        learnt = " ".join(filter(None, (took, told_apart(stock, ballot.votes))))
        file = studio.files.taste(reward)
        code = python_code(stock.job, ballot.votes, head)
        return (
            *_offered(file),
            _ranked(scores_of(TasteFile(file, features_here), stock), stock),
            _as_text(file),
            code,
            learnt,
        )

    def fit_if_enough(stock: Stock | None, ballot: Ballot, head: str) -> tuple[Any, ...]:
        return fit(stock, ballot, head) if stock and ballot.has_enough else (gr.skip(),) * 7

    @in_plain_words
    def open_taste(file: str | None, stock: Stock | None) -> tuple[Any, ...]:
        if not file:
            return (gr.skip(),) * 7
        path = studio.files.taste(TasteFile(file, features_here).load(device_of_code()))
        gr.Info("This taste is in use until you choose again.")
        loaded = 'from trimtab.rewards import load_reward\n\ntaste = load_reward("taste.safetensors")\n'
        scores = scores_of(TasteFile(path, features_here), stock) if stock else None
        return *_offered(path), _ranked(scores, stock) if scores else gr.skip(), _as_text(path), loaded, ""

    def restore(text: Any) -> tuple[Any, ...]:
        try:
            file = studio.files.content(_from_text(text), "taste", "safetensors")
            TasteFile(file, features_here).load(device_of_code())
        except ValueError:
            return (gr.skip(),) * 3
        return _offered(file)

    makes = [prompts, count, seed, features, few_steps, steps, guidance_scale]
    studio.on_run(
        ID, start.click, make_pairs, makes, [stock, ballot, *shown, facts, ranking, status], api_name="make_pairs",
        status=status,
    )  # fmt: skip
    studio.stop_button(ID, stop)
    fits = [path, download, use, ranking, kept, code, learnt]
    fitting: dict[str, Any] = {"concurrency_id": ID, "concurrency_limit": 1, "show_progress": "hidden"}
    asked = {"outputs": [ballot, *shown, facts], "queue": False, "show_progress": "hidden", "trigger_mode": "multiple"}
    triggers = [*((name, button.click) for name, button in buttons.items())]
    triggers += [(name, picture.select) for name, picture in zip(SIDES, shown, strict=False)]
    for number, (name, trigger) in enumerate(triggers):
        event = trigger(
            choose_picture, [side, stock, ballot, path], **asked, js=f"(...values) => ['{name}', ...values.slice(1)]",
            api_name="choose_picture" if number == 0 else None, api_visibility="private" if number else "public",
        )  # fmt: skip
        event.then(
            fit_if_enough, [stock, ballot, head], fits, **fitting, trigger_mode="always_last", api_visibility="private"
        )
    undo.click(take_back, [stock, ballot], **asked, api_visibility="private").then(
        fit_if_enough, [stock, ballot, head], fits, **fitting, trigger_mode="always_last", api_visibility="private"
    )
    head.input(fit_if_enough, [stock, ballot, head], fits, **fitting, api_visibility="private")
    gr.Button(visible=False).click(fit, [stock, ballot, head], fits, **fitting, api_name="fit_taste")
    opened.upload(open_taste, [opened, stock], fits, **_QUIET)
    studio.page.load(restore, [kept], [path, download, use], **_QUIET)
    names = ("prompts", "count", "seed", "features", "few_steps", "steps", "guidance_scale", "head")
    settings = dict(zip(names, [*makes, head], strict=True))
    return Tab(settings=settings, send_row=send_row, gives_taste=(use, path))


def _build_pair() -> tuple[list[Any], dict[str, Any], Any]:
    """The two pictures, the buttons by the side that they choose, and the one that takes a choice back."""
    shown, buttons = [], {}
    with gr.Row(elem_id="taste-pair", equal_height=True):
        for name in ("left", "right"):
            with gr.Column(min_width=120):
                shown.append(
                    gr.Image(
                        label=name.capitalize(),
                        type="pil",
                        format="png",
                        interactive=False,
                        height=290,
                        buttons=["fullscreen"],
                        elem_id=f"taste-{name}-picture",
                    )  # fmt: skip
                )
                arrow = "\u2190 I like this more" if name == "left" else "I like this more \u2192"
                buttons[name] = gr.Button(arrow, variant="primary", elem_id=f"taste-{name}")
    with gr.Row(elem_classes="tools"):
        buttons["neither"] = gr.Button("Neither: another pair", size="sm", elem_id="taste-neither")
        undo = gr.Button("Take the last choice back", size="sm", elem_id="taste-undo")
    return shown, buttons, undo


def _pair(stock: Stock, ballot: Ballot) -> tuple[Any, Any]:
    return tuple(stock.pictures[number] for number in ballot.pair) if ballot.pair else (None, None)


def _offered(path: str) -> tuple[Any, ...]:
    """The path of a taste, and the buttons that give it."""
    return path, gr.DownloadButton(value=path, interactive=True), gr.Button(interactive=True)


def _ranked(scores: list[float], stock: Stock) -> list[tuple[Any, str]]:
    """The pictures by their scores, the best first, with their places."""
    order = sorted(range(len(scores)), key=lambda number: -scores[number])
    return [(stock.pictures[number], f"{place}") for place, number in enumerate(order, 1)]


def _as_text(path: str) -> str:
    """A taste as the browser keeps it, so that it is there after a reload."""
    content = base64.b64encode(Path(path).read_bytes()).decode()
    return content if len(content) <= _LONGEST_KEPT else ""


def _from_text(text: Any) -> bytes:
    """The file that :func:`_as_text` gave.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(text, str) or not 0 < len(text) <= _LONGEST_KEPT:
        raise ValueError("nothing is kept")
    return base64.b64decode(text, validate=True)
