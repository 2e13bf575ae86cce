"""``trimtab bench guidance`` on a tiny random Stable Diffusion 3: what it measures, keeps and refuses."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.benchmarks import guidance_rules as rules
from trimtab.benchmarks import scene_figures
from trimtab.benchmarks.bundled_model import held_out_captions
from trimtab.benchmarks.figures import proportion_interval
from trimtab.benchmarks.scene_figures import Scenes
from trimtab.cli import main
from trimtab.guidance import GUIDERS

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

CAPTIONS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    tiny_pipeline("sd3").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(scene_figures, "MIN_SCENES", 8 * CAPTIONS)


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def bench(model: Path, output: Path, *options: str, rule: str = "apg") -> int:
    quick = ["--num-captions", str(CAPTIONS), "--steps", "2", "--batch-size", "5", "--device", "cpu"]
    which = ["--rules", "cfg", rule, "--scales", "1", "3", "15"]
    return main(["bench", "guidance", *which, *quick, "--model", str(model), "--output", str(output), *options])


def test_every_rule_is_in_the_plan():
    assert set(rules.PLAN) == {rules.NONE, *GUIDERS}
    cells = rules.plan()
    assert len(cells) == len(set(cells)) == sum(map(len, rules.PLAN.values()))
    assert {15.0} == {scale for rule, scale in cells if scale == 15.0} and ("apg", 15.0) in cells
    assert max(scale for rule, scale in cells if rule == "cfg++") == 1.0
    assert rules.plan(["apg", "cfg++"], [1.0, 4.0]) == [
        (rules.NONE, 1.0),
        ("apg", 4.0),
        *(("cfg++", scale) for scale in rules.PLAN["cfg++"]),
    ]


def test_scenes_are_what_pictures_should_be():
    captions = held_out_captions(CAPTIONS)
    scenes = Scenes(captions)
    assert scenes.cell["match"] == 1.0
    assert scenes.cell["saturation"] == pytest.approx(np.mean(scenes.saturation), rel=0.1)
    assert scenes.cell["contrast"] == pytest.approx(np.mean(scenes.contrast), rel=0.2)
    grey = scenes.measure(torch.full((CAPTIONS, 3, 128, 128), 0.5))
    assert grey["match"] == grey["saturation"] == grey["contrast"] == 0
    assert grey["frechet"] > 2 * scenes.cell["frechet"] > 0


def test_figures_are_those_of_the_stock_pipelines_pictures(model, tmp_path, capsys):
    assert bench(model, tmp_path / "made") == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "made" / "guidance.json").read_text())
    cells = {(cell["rule"], cell["scale"]): cell for cell in report["cells"]}
    assert list(cells) == [("none", 1), ("cfg", 3), ("cfg", 15), ("apg", 3), ("apg", 15)]
    pipe = StableDiffusion3Pipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    captions = held_out_captions(CAPTIONS)
    for rule, scale in (("none", 1), ("cfg", 15)):
        images = pipe(
            captions,
            num_inference_steps=2,
            guidance_scale=scale,
            max_sequence_length=16,
            generator=[torch.Generator().manual_seed(2024 + i) for i in range(CAPTIONS)],
        ).images
        expected = [np.asarray(image.convert("HSV"))[..., 1].mean() / 255 for image in images]
        assert cells[rule, scale]["pictures"]["saturation"] == pytest.approx(expected, abs=0.01)
    assert cells["cfg", 3]["pictures"]["saturation"] != cells["apg", 3]["pictures"]["saturation"]
    assert report["claims"]["apg_match_at_15"] == cells["apg", 15]["match"]
    ratio = report["claims"]["apg_saturation_over_scenes_at_15"]
    of_scenes = np.mean(report["scenes"]["per_caption"]["saturation"])
    assert ratio[0] == pytest.approx(cells["apg", 15]["saturation"] / of_scenes, rel=1e-3)
    assert ratio[1] <= ratio[0] <= ratio[2]

    table = (tmp_path / "made" / "guidance.md").read_text()
    assert table.count("\n| ") == 2 + 5
    low, high = proportion_interval(0, CAPTIONS)
    assert f"| apg | 15 | 0% ({low:.0%} to {high:.0%}) |" in table
    assert printed.count("\napg ") >= 2 and "apg at w = 15: saturation" in printed
    with Image.open(tmp_path / "made" / "guidance.png") as image:
        assert image.width > 500 and np.asarray(image).std() > 10
    names = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert names == ["guidance.json", "guidance.md", "guidance.png"]


def without_times(folder: Path) -> list[dict]:
    cells = json.loads((folder / "guidance.json").read_text())["cells"]
    return [{key: value for key, value in cell.items() if key != "seconds_per_picture"} for cell in cells]


def test_an_interrupted_run_goes_on_where_it_was(model, tmp_path, monkeypatch, no_matplotlib):
    assert bench(model, tmp_path / "whole") == 0
    sample, drawn = rules.sample, []

    def interrupted(*args, **options):
        drawn.append((options["guidance"], options["guidance_scale"]))
        if len(drawn) == 4:  # the second cell's second batch
            raise KeyboardInterrupt
        return sample(*args, **options)

    monkeypatch.setattr(rules, "sample", interrupted)
    assert bench(model, tmp_path / "cut") == 130
    assert [cell["rule"] for cell in without_times(tmp_path / "cut")] == ["none"]
    assert bench(model, tmp_path / "cut") == 0
    assert drawn[4:6] == [("cfg", 3.0)] * 2  # not the first cell again
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")
    made = len(drawn)
    assert bench(model, tmp_path / "cut") == 0 and len(drawn) == made
    assert bench(model, tmp_path / "cut", rule="rescale") == 0  # further rules join those that are there
    assert drawn[made:] == [("rescale", 3.0)] * 2 + [("rescale", 15.0)] * 2
    assert len(without_times(tmp_path / "cut")) == 7


def test_a_rule_with_other_settings_is_measured_anew(model, tmp_path, monkeypatch):
    pipe = StableDiffusion3Pipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    settings = rules.Settings(rules.digest(str(model)), CAPTIONS, 1, 0, "float32", "cpu", Scenes.number(CAPTIONS))
    path, done = tmp_path / "guidance.json", []
    for _ in range(2):
        rules.run(pipe, settings, [("apg", 3.0)], path, on_cell=done.append)
    assert len(done) == 1
    make = rules.make_guider
    monkeypatch.setattr(rules, "make_guider", lambda *of: make(*of).new(eta=0.5))
    report = rules.run(pipe, settings, [("apg", 3.0)], path, on_cell=done.append)
    assert len(done) == 2 and len(report["cells"]) == 1
    other = dataclasses.replace(settings, steps=2)
    with pytest.raises(rules.UsageError, match=r"other settings \(steps 1, not 2\)"):
        rules.run(pipe, other, [("apg", 3.0)], path)
    assert len(rules.run(pipe, other, [("cfg", 3.0)], path, overwrite=True)["cells"]) == 1
    path.write_text("{}")
    with pytest.raises(rules.UsageError, match="no results of this benchmark"):
        rules.run(pipe, settings, [("apg", 3.0)], path)


def test_without_matplotlib_the_rest_is_written(model, tmp_path, no_matplotlib, capsys):
    assert bench(model, tmp_path, "--scales", "3") == 0
    assert capsys.readouterr().out.count("no plot: matplotlib is not installed") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guidance.json", "guidance.md"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rules", "apgg"], "--rules takes some of none, cfg, apg"),
        (["--scales", "-1"], "--scales takes finite numbers, 0 or more; got -1"),
        (["--scales", "nan"], "--scales takes finite numbers"),
        (["--num-captions", "4"], "--num-captions takes a whole number, 8 or more; got 4"),
        (["--steps", "0"], "--steps takes a whole number, 1 or more; got 0"),
        (["--model", "/no/such/folder"], "/no/such/folder does not exist"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(model, tmp_path, options, words, capsys):
    assert bench(model, tmp_path / "made", *options) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("trimtab: error: ") and captured.err.count("\n") == 1 and words in captured.err
    assert not (tmp_path / "made").exists()


def test_bench_names_its_benchmarks(capsys):
    assert main(["bench"]) == 2
    assert main(["bench", "--help"]) == 0
    assert "guidance" in capsys.readouterr().out


def test_deviation_sees_changes_that_the_mean_hides():
    report = {"scenes": {"per_caption": {"saturation": [0.4, 0.2]}, "mean_saturation": 0.3}}
    cell = {"pictures": {"saturation": [0.5, 0.1]}, "saturation": 0.3}
    assert rules.saturation_ratio(report, cell)[0] == 1.0
    assert rules.saturation_deviation(report, cell) == pytest.approx((0.25 + 0.5) / 2)
