"""The editing benchmark: its edits, its figures against other implementations, a small run, and going on with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from scipy import ndimage

from trimtab.assets import asset_path
from trimtab.benchmarks import editing
from trimtab.benchmarks.editing import front_table
from trimtab.benchmarks.editing_cells import ITERATIONS, METHODS, cells_of
from trimtab.benchmarks.editing_plot import plot
from trimtab.benchmarks.editing_scenes import FIGURES, KINDS, edit_cases, measure, ssim_map
from trimtab.recipes.emoji_scenes import Scene


def rendered(scenes: list[Scene]) -> torch.Tensor:
    return torch.from_numpy(np.stack([scene.render() for scene in scenes])).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_changes_what_its_kind_says(kind: str) -> None:
    cases = [case for case in edit_cases(16, seed=3) if case.kind == kind]
    assert len(cases) == 4
    for case in cases:
        before, after = case.source, case.target
        assert before.facts.is_held_out() and after.facts.is_held_out()
        assert before.caption != after.caption
        names = [[item.name for item in scene.objects] for scene in (before, after)]
        boxes = [[item.box for item in scene.objects] for scene in (before, after)]
        assert (names[0] == names[1]) == (kind in ("background", "relation"))
        assert (boxes[0] == boxes[1]) == (kind != "relation")
        assert (before.background == after.background) == (kind != "background")
        if kind == "colour":
            assert [name.split()[-1] for name in names[0]] == [name.split()[-1] for name in names[1]]


def test_the_same_seed_gives_the_same_edits() -> None:
    assert edit_cases(8, seed=1) == edit_cases(8, seed=1)
    assert edit_cases(4, seed=1) == edit_cases(8, seed=1)[:4]
    assert edit_cases(8, seed=1) != edit_cases(8, seed=2)


def test_truth_is_perfect_and_the_source_is_right_outside_only() -> None:
    cases = edit_cases(4)
    figures = measure(rendered([case.target for case in cases]), cases)
    assert figures["success"] == [1.0] * 4
    assert min(figures["psnr_outside"] + figures["psnr_inside"]) > 99
    assert min(figures["ssim_outside"] + figures["ssim_inside"]) == pytest.approx(1, abs=1e-5)
    figures = measure(rendered([case.source for case in cases]), cases)
    assert figures["success"] == [0.0] * 4
    assert min(figures["psnr_outside"]) > 45  # differences that rounding hides
    assert max(figures["psnr_inside"]) < 25


def test_psnr_of_known_noise() -> None:
    cases = edit_cases(1)
    truth = rendered([cases[0].target])
    off = torch.where(cases[0].changed, 0.1, 0.01)
    figures = measure((truth + torch.where(truth < 0.5, off, -off)), cases)
    assert figures["psnr_inside"][0] == pytest.approx(20, abs=1e-3)
    assert figures["psnr_outside"][0] == pytest.approx(40, abs=1e-3)


def test_ssim_by_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 2, 24, 20, generator=generator, dtype=torch.float64) for _ in range(2))

    def blurred(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, 1.5, truncate=5 / 1.5, mode="mirror")

    for channel in range(2):
        a, b = x[0, channel].numpy(), y[0, channel].numpy()
        mean_a, mean_b = blurred(a), blurred(b)
        var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
        both = blurred(a * b) - mean_a * mean_b
        top = (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
        expected = top / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
        np.testing.assert_allclose(ssim_map(x, y)[0, channel].numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_cells_cost_the_budget(method: str) -> None:
    """Steps of the schedule times evaluations of a step, with what comes on top."""
    for cell in cells_of(method, 45, 5.0):
        steps = round(cell.options["num_inference_steps"] * cell.options["strength"])
        cost = {"sdedit": 2, "flowedit": 4, "rf-solver": 6}.get(method, 3) * steps
        if method == "flowopt":
            points = cell.options["num_optimization_steps"] + 1
            inverse = cell.options.get("acceleration") == "inverse"
            cost = (3 * steps + 1) * points if inverse else steps + 1 + 2 * steps * points
        assert cost == pytest.approx(45, abs=3)


@pytest.fixture(scope="module")
def small(tmp_path_factory: Any) -> tuple[dict[str, Any], Path]:
    path = tmp_path_factory.mktemp("editing") / "editing.json"
    return quick_run(path, ["sdedit", "flowopt"]), path


def quick_run(path: Path, methods: list[str]) -> dict[str, Any]:
    model = asset_path("emoji-scenes")
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return editing.run(pipe, model, num_edits=2, methods=methods, budget=12, guidance_scale=2.0, path=path)


def test_a_small_run(small: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    report, path = small
    assert json.loads(path.read_text()) == report
    assert len(report["cells"]) == 3 + 3 * sum(iterations + 1 for iterations in ITERATIONS.values())
    for cell in report["cells"]:
        assert all(len(cell[name]) == 2 for name in FIGURES)
    flowopt = [cell for cell in report["cells"] if cell["method"] == "flowopt"]
    assert [cell["num_function_evaluations"] for cell in flowopt[:2]] == [7, 11]
    assert [cell["num_function_evaluations"] for cell in flowopt[6:9]] == [7, 11, 15]
    assert [cell["num_function_evaluations"] for cell in flowopt[-2:]] == [7, 14]
    assert min(report["references"]["autoencoder"]["psnr_outside"]) > 20
    table = front_table(report)
    assert table.count("\n") == 1 + len(report["cells"])
    assert "| sdedit | strength 0.5 | 12 |" in table
    plot(report, tmp_path / "fronts.png")
    assert (tmp_path / "fronts.png").stat().st_size > 10_000


def test_an_interrupted_run_goes_on(small: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    report, _ = small
    path = tmp_path / "editing.json"
    first = report | {"cells": [cell | {"seconds_of_run": -1.0} for cell in report["cells"][:2]]}
    path.write_text(json.dumps(first))
    again = quick_run(path, ["sdedit"])
    assert [cell["seconds_of_run"] for cell in again["cells"][:2]] == [-1.0, -1.0]
    assert [cell["psnr_outside"] for cell in again["cells"]] == [cell["psnr_outside"] for cell in report["cells"][:3]]
    path.write_text(json.dumps(first | {"settings": {}}))
    assert all(cell["seconds_of_run"] >= 0 for cell in quick_run(path, ["sdedit"])["cells"])
