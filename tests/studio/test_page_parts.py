"""Parts of the page that need no browser: the chart, the painter's mask, and settings read back."""

import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from gradio import processing_utils
from PIL import Image

from trimtab.commands.pictures import save_png
from trimtab.studio.cache import write_whole
from trimtab.studio.chart import curve_svg
from trimtab.studio.create_job import CreateJob
from trimtab.studio.edit_inputs import painted_mask
from trimtab.studio.edit_job import EditJob
from trimtab.studio.improve_job import ImproveJob
from trimtab.studio.metadata import checked_settings, made_by, plain_settings
from trimtab.studio.reading import read_back
from trimtab.studio.tab import Tab

SVG = "{http://www.w3.org/2000/svg}"


def points(svg, number):
    lines = ElementTree.fromstring(svg).findall(f"{SVG}polyline")
    return np.array([[float(value) for value in pair.split(",")] for pair in lines[number].get("points").split()])


def test_a_chart_is_to_scale_and_says_what_it_shows():
    svg = curve_svg({"each": [1.0, float("nan"), 3.0, 2.0], "best": [1.0, 1.0, 3.0, 3.0]}, "iteration", "<reward>")
    each, best = points(svg, 0), points(svg, 1)
    assert len(each) == 3 and len(best) == 4  # a gap for what is not finite
    assert np.allclose(best[:, 0], np.linspace(best[0, 0], best[-1, 0], 4), atol=0.1)
    assert 0 <= best[-1, 1] < best[0, 1] - 100 and best[0, 1] <= 200  # more is higher, and fills the height
    assert np.isclose(each[0, 1] - each[2, 1], (each[0, 1] - each[1, 1]) / 2, atol=0.1)  # 2 is halfway from 1 to 3
    assert (
        ElementTree.fromstring(svg).get("aria-label") == "<reward> over iteration: each from 1 to 2; best from 1 to 3"
    )


@pytest.mark.parametrize("values", [[], [float("nan")], [5.0], [2.0, 2.0], [-1e9, 1e9], [0.0, 1e-12]])
def test_any_values_make_a_chart(values):
    svg = curve_svg({"loss": values}, "step", "loss")
    assert "nan" not in svg.replace("nothing", "") and "inf" not in svg
    assert len(ElementTree.fromstring(svg).findall(f"{SVG}text")) < 20


def test_paint_is_a_mask():
    layer = Image.new("RGBA", (40, 20))
    assert painted_mask(None) is None
    assert painted_mask({"layers": [layer], "background": None, "composite": None}) is None
    layer.paste((99, 102, 241, 255), (10, 5, 20, 15))
    mask = np.asarray(painted_mask({"layers": [layer], "background": None, "composite": None}))
    assert mask.shape == (20, 40, 3) and mask[5:15, 10:20].min() == 255 and mask.sum() == 255 * 3 * 100


@pytest.fixture(scope="module")
def tabs():
    settings = {
        "prompt": gr.Textbox(),
        "guidance": gr.Dropdown(["apg", "cfg"]),
        "guidance_scale": gr.Slider(0, 30),
        "seed": gr.Number(precision=0, minimum=0),
    }
    return {"create": Tab(settings, job=CreateJob), "other": Tab({"prompt": gr.Textbox()})}


def test_a_picture_gives_its_settings_back(tabs, tmp_path):
    job = CreateJob("a cat", guidance="cfg", guidance_scale=7.5, seed=4)
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", made_by("create", plain_settings(job)))
    values = {"prompt": "a cat", "guidance": "cfg", "guidance_scale": 7.5, "seed": 4}
    assert read_back(str(tmp_path / "a.png"), tabs) == ("create", values)


@pytest.mark.parametrize(
    "settings",
    [{"guidance": "../apg"}, {"guidance_scale": 1e9}, {"guidance_scale": "7"}, {"seed": -1}, {"seed": True}, {"x": 1}],
)
def test_what_a_component_does_not_take_is_left_out(tabs, tmp_path, settings):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", made_by("create", {"prompt": "a cat", **settings}))
    assert read_back(str(tmp_path / "a.png"), tabs) == ("create", {"prompt": "a cat"})


def test_a_picture_of_the_command_line_goes_to_the_first_tab(tabs, tmp_path):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"prompt": "an owl", "seed": 3, "settings": {"a": 1}})
    assert read_back(str(tmp_path / "a.png"), tabs) == ("create", {"prompt": "an owl", "seed": 3})
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert read_back(str(tmp_path / "b.png"), tabs) == read_back(None, tabs) == ("", {})


JOBS = [
    CreateJob("a cat", guidance="cfg", guidance_scale=7.5, seed=4),
    ImproveJob("a cat", palette="pink", palette_weight=2.0, few_steps=False),
    EditJob(Image.new("RGB", (8, 8)), "a cat", "a dog", None, "flowedit", strength=0.5),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: type(job).__name__)
def test_each_job_takes_its_own_settings_back(job):
    assert checked_settings(type(job), plain_settings(job)) == (plain_settings(job), [])


def test_a_picture_in_the_cache_is_never_half_there(tmp_path, monkeypatch):
    """A second visitor's same picture leaves the file alone, and the first comes by a rename."""
    write_whole()
    picture, renamed = Image.new("RGB", (32, 32), "pink"), []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (renamed.append(Path(old).read_bytes()), replace(old, new)))
    paths = {processing_utils.save_pil_to_cache(picture, str(tmp_path), format="png") for _ in range(2)}
    (path,) = paths
    assert renamed == [Path(path).read_bytes()] and Image.open(path).getpixel((0, 0)) == (255, 192, 203)
    assert [file.name for file in Path(path).parent.iterdir()] == ["image.png"]
    gallery = gr.Gallery(format="png")
    gallery.GRADIO_CACHE = str(tmp_path)
    assert gallery.postprocess([picture]).root[0].image.path == path and len(renamed) == 1  # gradio calls it
