"""Ways of editing real pictures on edits whose right result is known, at equal evaluations of the network.

    trimtab bench editing --parts edits [--num-pictures 64] [--methods flowopt flowedit] [--budget 45]

The pictures are rendered EmojiScenes with held-out captions, the edits another object, another colour, another ground,
or two objects with their places changed. Each method is run over the knob that trades change for preservation. A
cell's steps are as many as the budget of evaluations a picture pays for, a guided step counting two. Success is the
judge's verdict on the edited picture under the target caption; preservation is measured against the rendered truth,
outside and inside of what the edit changes. The autoencoder's round trip of the truth is the ceiling. A run that was
interrupted goes on with the cells that are missing, as long as the model and the settings are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from trimtab.benchmarks.editing_cells import Cell, cells_of
from trimtab.benchmarks.editing_scenes import FIGURES, EditCase, edit_cases, mean_interval, measure
from trimtab.benchmarks.figures import proportion_interval
from trimtab.pipelines import EditPipeline, FlowOptPipeline

__all__ = ["front_table", "run", "show"]

TEXT_TOKENS = 16


@torch.no_grad()
def run(
    pipe: DiffusionPipeline,
    model: str | Path,
    *,
    num_edits: int,
    methods: Sequence[str],
    budget: int,
    guidance_scale: float,
    path: Path,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures the cells that the file lacks, and writes it after each.

    Args:
        pipe: a stock pipeline; its autoencoder is made float32, like the latents.
        model: its folder, whose weights' digest tells results of one model from those of another, or its Hub id.
        num_edits: edits.
        methods: names out of `METHODS`.
        budget: evaluations a picture.
        guidance_scale: of the target prompt.
        path: of the JSON file.
        batch_size: pictures at a time.
        seed: of the scenes and of the noise.

    Returns:
        What the file holds.
    """
    settings = {
        "model_sha256": _digest(Path(model) / "transformer"),
        "num_edits": num_edits,
        "budget": budget,
        "guidance_scale": guidance_scale,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "seed": seed,
    }
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if report.get("settings") != settings:
        report = {"settings": settings, "references": {}, "cells": []}
    pipe.vae.float()
    cases = edit_cases(num_edits, seed)
    if not report["references"]:
        report["references"] = _references(pipe, cases, batch_size)
    done = {(cell["method"], cell["run"]) for cell in report["cells"]}
    for method in methods:
        for cell in cells_of(method, budget, guidance_scale):
            if (method, cell.knob) in done:
                continue
            report["cells"] += _measured(pipe, cell, cases, batch_size, seed)
            _write(report, path)
            print(front_table(report, [method]).splitlines()[-1], flush=True)
    _write(report, path)
    return report


def _measured(
    pipe: DiffusionPipeline, cell: Cell, cases: list[EditCase], batch_size: int, seed: int
) -> list[dict[str, Any]]:
    points: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    for start in range(0, len(cases), batch_size):
        batch = cases[start : start + batch_size]
        for knob, evaluations, images in _edits(pipe, cell, batch, seed + start):
            point = points.setdefault(
                knob,
                {"method": cell.method, "run": cell.knob, "knob": knob, **{name: [] for name in FIGURES}},
            )
            point["num_function_evaluations"] = evaluations
            for name, values in measure(images, batch).items():
                point[name] += [round(value, 4) for value in values]
    seconds = time.perf_counter() - started
    shared = {"seconds_of_run": round(seconds, 1), "options": cell.options}
    return [point | shared for point in points.values()]


def _edits(
    pipe: DiffusionPipeline, cell: Cell, batch: list[EditCase], seed: int
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """The pictures of a cell: one batch of a baseline, one an iterate of FlowOpt."""
    arguments = {
        "image": [case.source.to_image() for case in batch],
        "prompt": [case.target.caption for case in batch],
        "source_prompt": [case.source.caption for case in batch],
        "max_sequence_length": TEXT_TOKENS,
        **cell.options,
    }
    if cell.method != "flowopt":
        generators = [torch.Generator().manual_seed(seed + index) for index in range(len(batch))]
        out = EditPipeline(pipe, cell.method)(**arguments, generator=generators, output_type="pt")
        yield cell.knob, out.num_function_evaluations, out.images.float().cpu()
        return
    for state in FlowOptPipeline.from_pipe(pipe).stream(**arguments):
        yield f"{cell.knob}, iterate {state.iteration}", state.num_function_evaluations, state.images.float().cpu()


def _references(pipe: DiffusionPipeline, cases: list[EditCase], batch_size: int) -> dict[str, Any]:
    """The truth after the autoencoder's round trip, and the source picture left as it is, as a method would give it."""
    references: dict[str, dict[str, list[float]]] = {}
    for name in ("autoencoder", "source"):
        figures: dict[str, list[float]] = {figure: [] for figure in FIGURES}
        for start in range(0, len(cases), batch_size):
            batch = cases[start : start + batch_size]
            scenes = [case.target if name == "autoencoder" else case.source for case in batch]
            images = torch.stack([torch.from_numpy(scene.render()).permute(2, 0, 1) for scene in scenes])
            if name == "autoencoder":
                latents = pipe.vae.encode(images.to(pipe.vae.device) * 2 - 1).latent_dist.mode()
                images = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).float().cpu()
            for figure, values in measure(images, batch).items():
                figures[figure] += [round(value, 4) for value in values]
        references[name] = figures
    return references


def front_table(report: dict[str, Any], methods: Sequence[str] | None = None) -> str:
    """A Markdown table of the points, with 95% intervals: Wilson's of success, bootstrap of the means."""
    rows = [
        "| method | knob | evaluations | success | PSNR outside (dB) | PSNR inside (dB) | SSIM outside | SSIM inside |"
    ]
    rows.append("|---|---|---|---|---|---|---|---|")
    points = [cell for cell in report["cells"] if methods is None or cell["method"] in methods]
    for cell in points:
        low, high = proportion_interval(int(sum(cell["success"])), len(cell["success"]))
        share = sum(cell["success"]) / len(cell["success"])
        columns = [cell["method"], cell["knob"], str(cell["num_function_evaluations"])]
        columns.append(f"{share:.2f} ({low:.2f} to {high:.2f})")
        for name, digits in (("psnr_outside", 1), ("psnr_inside", 1), ("ssim_outside", 3), ("ssim_inside", 3)):
            low, high = mean_interval(cell[name])
            mean = sum(cell[name]) / len(cell[name])
            columns.append(f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
        rows.append(f"| {' | '.join(columns)} |")
    return "\n".join(rows)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _write(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(report) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def show(report: dict[str, Any]) -> None:
    """Prints the table and what the autoencoder's round trip and the picture left as it is would get."""
    print(front_table(report))
    for name, figures in report["references"].items():
        means = ", ".join(f"{figure} {sum(values) / len(values):.3f}" for figure, values in figures.items())
        print(f"{name}: {means}")
