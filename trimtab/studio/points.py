"""The Points tab: clouds and meshes reconstructed, between one another, and new."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from .chart import curve_svg
from .checks import as_whole
from .metadata import made_by
from .points_job import (
    LOSSES,
    MOST_CLOUDS,
    MOST_STEPS,
    Clouds,
    InterpolateJob,
    Reconstructed,
    ReconstructJob,
    SampleJob,
)
from .points_source import ENDINGS, MOST_NUMBER, SHAPES, Shape, Upload
from .points_view import figure
from .runs import Update
from .tab import Studio, Tab, seed_input
from .words import in_plain_words, status_html

__all__ = ["ID", "TITLE", "build_tab"]

ID = "points"
TITLE = "Points"

_ABOUT = """A small frozen model turns clouds and meshes into short codes, and codes into clouds. Under a loss of your
choice the code moves until its cloud is nearer to yours. Drag a view to turn it, scroll to zoom."""
_PAUSE = 0.3
"""Seconds between two notes of a descent's steps."""
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def build_tab(studio: Studio) -> Tab:
    """Makes the components and the events."""
    gr.Markdown(_ABOUT)
    with gr.Tabs(elem_id="points-tabs"):
        with gr.Tab("Reconstruct", id="points-reconstruct"):
            settings = _build_reconstruct(studio)
        with gr.Tab("Between two shapes", id="points-between"):
            settings |= _build_between(studio)
        with gr.Tab("New shapes", id="points-new"):
            settings |= _build_new(studio)
    return Tab(settings=settings)


def _build_reconstruct(studio: Studio) -> dict[str, Any]:
    with gr.Row(elem_classes="tab-grid", equal_height=False):
        with gr.Column(elem_classes="part-ask"):
            _, shape, number = source = _source("points", "chair", "Or upload a file")
            with gr.Row(elem_classes="buttons"):
                start = gr.Button("Reconstruct", variant="primary", min_width=100, elem_id="points-run")
                stop = gr.Button("Stop", min_width=60, elem_id="points-stop")
        with gr.Column(elem_classes="part-result"):
            status = studio.status("points", "Ready. The last six shapes are of kinds that the model never saw.")
            view = gr.Plot(label="Given and made", elem_id="points-view")
            table = gr.Dataframe(
                _table({}, {}), label="Distances between the two, at unit radius", interactive=False, buttons=[],
                wrap=True, column_widths=["44%", "28%", "28%"],
                elem_id="points-table",
            )  # fmt: skip
            curve = gr.HTML(_curve(()), label="Loss", elem_id="points-curve", elem_classes="curve")
            with gr.Row(elem_classes="tools"):
                download = gr.DownloadButton("Download (PLY)", size="sm", interactive=False, elem_id="points-ply")
            code = _code("points-python")
        with gr.Column(elem_classes="part-settings"):
            loss = gr.Dropdown(
                [(label, key) for key, label in LOSSES.items()], value="sliced_wasserstein", label="Loss",
                info="What the code descends", elem_id="points-loss",
            )  # fmt: skip
            steps = gr.Slider(1, MOST_STEPS, 60, step=1, label="Steps", info="Of that descent", elem_id="points-steps")

    @in_plain_words
    def reconstruct_points(
        file: str | None, shape: str, number: int, loss: str, steps: int, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Reconstructs a cloud or mesh; under a loss, its code descends it. A file counts before a shape."""
        job = ReconstructJob(_chosen(studio, file, shape, number), loss, as_whole(steps))
        nothing, last, told = gr.skip(), None, 0.0
        yield nothing, nothing, nothing, gr.DownloadButton(value=None, interactive=False), "", status_html("Waiting")
        for update in studio.stream(job, request, ID):
            last = update.result or last
            if update.new and last is not None:
                yield *_shown(last), nothing, nothing, status_html(update.note)
            elif time.monotonic() - told > _PAUSE:
                yield *[nothing] * 5, status_html(update.note)
            else:
                continue
            told = time.monotonic()
        if not isinstance(last, Reconstructed):
            return
        name = Path(file).stem if file else f"{shape} {job.source.number}"
        done = replace(job, steps=max(1, last.step))
        settings = _shape_settings(done.source) | {"loss": done.loss, "steps": done.steps}
        path = studio.files.cloud(last.cloud, f"{name} reconstruction", made_by(ID, settings))
        yield (
            *_shown(last), gr.DownloadButton(value=path, interactive=True), done.python_code(),
            status_html(_told(update, last)),
        )  # fmt: skip

    outputs = [view, table, curve, download, code, status]
    inputs = [*source, loss, steps]
    studio.on_run(
        ID, start.click, reconstruct_points, inputs, outputs, api_name="reconstruct_points", status=status, line=ID
    )
    studio.stop_button(ID, stop)

    @in_plain_words
    def show_given(file: str | None, shape: str, number: int) -> tuple[Any, ...]:
        return _given(_chosen(studio, file, shape, number)), _table({}, {}), _curve(())

    # With no trigger named: when the page opens, and whenever an input changes.
    gr.on(None, show_given, list(source), [view, table, curve], **_QUIET)
    return {"shape": shape, "number": number, "loss": loss, "steps": steps}


def _build_between(studio: Studio) -> dict[str, Any]:
    identity = "points-between"
    with gr.Row(elem_classes="tab-grid", equal_height=False):
        with gr.Column(elem_classes="part-ask"):
            first = _source("points-first", "chair", "Or upload the first")
            last = _source("points-last", "table", "Or upload the last")
            start = gr.Button("Interpolate", variant="primary", elem_id="points-between-run")
        with gr.Column(elem_classes="part-result"):
            status = studio.status(identity, "Ready. The way goes at even steps between the two codes.")
            view = gr.Plot(label="From the first to the last", elem_id="points-between-view")
            files = _files("points-between-ply")
            code = _code("points-between-python")
        with gr.Column(elem_classes="part-settings"):
            count = gr.Slider(
                2, MOST_CLOUDS, 6, step=1, label="Clouds", info="Both ends included", elem_id="points-count"
            )

    @in_plain_words
    def interpolate_points(
        first_file: str | None,
        first_shape: str,
        first_number: int,
        last_file: str | None,
        last_shape: str,
        last_number: int,
        count: int,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Clouds from one to another, at even steps between their codes. A file counts before a shape."""
        ends = (
            _chosen(studio, first_file, first_shape, first_number),
            _chosen(studio, last_file, last_shape, last_number),
        )
        job = InterpolateJob(*ends, as_whole(count))
        settings = _shape_settings(ends[0], "first_") | _shape_settings(ends[1], "last_") | {"between": job.count}
        yield from _clouds(studio, job, request, identity, "between", settings)

    outputs = [view, files, code, status]
    studio.on_run(
        identity, start.click, interpolate_points, [*first, *last, count], outputs, api_name="interpolate_points",
        status=status, line=ID,
    )  # fmt: skip
    (_, first_shape, first_number), (_, last_shape, last_number) = first, last
    return {
        "first_shape": first_shape,
        "first_number": first_number,
        "last_shape": last_shape,
        "last_number": last_number,
        "between": count,
    }


def _build_new(studio: Studio) -> dict[str, Any]:
    identity = "points-new"
    with gr.Row(elem_classes="tab-grid", equal_height=False):
        with gr.Column(elem_classes="part-ask"):
            count = gr.Slider(1, MOST_CLOUDS, 6, step=1, label="Clouds", elem_id="points-new-count")
            seed = seed_input("points-seed")
            start = gr.Button("Draw new shapes", variant="primary", elem_id="points-new-run")
        with gr.Column(elem_classes="part-result"):
            status = studio.status(identity, "Ready. A flow turns noise into codes that no shape gave.")
            view = gr.Plot(label="New shapes", elem_id="points-new-view")
            files = _files("points-new-ply")
            code = _code("points-new-python")

    @in_plain_words
    def sample_points(count: int, seed: int, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Draws new clouds: noise through the flow to codes, codes through the decoder."""
        job = SampleJob(as_whole(count), as_whole(seed))
        yield from _clouds(studio, job, request, identity, "new", {"new": job.count, "seed": job.seed})

    outputs = [view, files, code, status]
    studio.on_run(
        identity, start.click, sample_points, [count, seed], outputs, api_name="sample_points", status=status, line=ID
    )
    return {"new": count, "seed": seed}


def _clouds(
    studio: Studio,
    job: InterpolateJob | SampleJob,
    request: gr.Request,
    tab: str,
    name: str,
    settings: dict[str, Any],
) -> Iterator[tuple[Any, ...]]:
    """Runs a job that makes several clouds; the files are named as those of its code."""
    nothing, last = gr.skip(), None
    yield nothing, None, "", status_html("Waiting")
    for update in studio.stream(job, request, tab):
        last = update.result or last
        yield nothing, nothing, nothing, status_html(update.note)
    if isinstance(last, Clouds):
        clouds = list(last.clouds)
        about = made_by(ID, settings)
        files = [studio.files.cloud(cloud, f"{name}-{index}", about) for index, cloud in enumerate(clouds, 1)]
        labels = [str(index) for index in range(1, len(clouds) + 1)]
        yield figure(clouds, labels), files, job.python_code(), status_html(update.note)


def _source(identity: str, shape: str, label: str) -> tuple[Any, Any, Any]:
    """Where a cloud comes from: a file, or a drawn shape and its number."""
    with gr.Group(), gr.Row():
        name = gr.Dropdown(list(SHAPES), value=shape, label="Shape", min_width=130, elem_id=f"{identity}-shape")
        number = gr.Number(
            1, label="Which one", precision=0, minimum=0, maximum=MOST_NUMBER, min_width=90,
            elem_id=f"{identity}-number",
        )  # fmt: skip
    file = gr.File(
        label=label, file_types=list(ENDINGS), type="filepath", height=130, elem_id=f"{identity}-file",
    )  # fmt: skip
    return file, name, number


def _files(identity: str) -> Any:
    return gr.Files(label="Download the clouds (PLY)", interactive=False, height=150, elem_id=identity)


def _code(identity: str) -> Any:
    with gr.Accordion("Copy as Python", open=False, elem_id=identity):
        return gr.Code(language="python", label="The code that makes the same", interactive=False)


def _chosen(studio: Studio, file: str | None, shape: str, number: int) -> Shape | Upload:
    if file:
        return Upload(file, studio.limits.largest_upload)
    return Shape(shape, as_whole(number))


def _shape_settings(source: Shape | Upload, prefix: str = "") -> dict[str, Any]:
    """A drawn shape as settings of the tab; a file is the person's own."""
    return {f"{prefix}shape": source.name, f"{prefix}number": source.number} if isinstance(source, Shape) else {}


def _given(source: Shape | Upload) -> Any:
    from trimtab.geometry import normalize_cloud

    return figure([normalize_cloud(source.load())[0]], ["given"], given=1)


def _shown(made: Reconstructed) -> tuple[Any, ...]:
    """What the view, the table and the curve show."""
    view = figure([made.given, made.best], ["given", "reconstruction"], given=1)
    return view, _table(made.at_first, made.distances if made.losses else {}), _curve(made.losses)


def _table(first: dict[str, float], last: dict[str, float]) -> pd.DataFrame:
    rows = [(name, f"{value:.4f}", f"{last[name]:.4f}" if last else "") for name, value in first.items()]
    return pd.DataFrame(rows, columns=["Distance", "Encoder", "Refined"])


def _curve(losses: tuple[float, ...]) -> str:
    best = list(itertools.accumulate(losses, min))
    return curve_svg({"each step": losses, "best so far": best}, "step", "loss")


def _told(update: Update, made: Reconstructed) -> str:
    if not made.losses:
        return update.note
    return f"{update.note} Loss {made.losses[0]:.5f} at first, {min(made.losses):.5f} at best."
