"""The Points tab as a person meets it: from the first click to the file."""

import re

import numpy as np

from trimtab.geometry import load_point_cloud, save_point_cloud
from trimtab.recipes.point_clouds import draw_cloud

PATIENCE = 300_000
"""Milliseconds: without a graphics card the browser draws points slowly."""
DONE = re.compile("Done in")
SHOWN = """identity => document.querySelector(`#${identity} .js-plotly-plot`)?._fullData
    ?.filter((trace) => trace.mode === 'markers').map((trace) => trace.x.length ?? trace._length)"""


def open_points(page):
    page.get_by_role("tab", name="Points", exact=True).click()
    page.wait_for_function(f"({SHOWN})('points-view')?.length === 1", timeout=PATIENCE)  # the shape that is chosen


def set_number(page, identity, value):
    field = page.locator(f"#{identity} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def wait_until_done(page, tab):
    page.locator(f"#{tab}-status").get_by_text(DONE).wait_for(timeout=PATIENCE)


def test_a_shape_is_reconstructed_under_a_loss_turned_and_downloaded(page, tmp_path):
    open_points(page)
    page.locator("#points-loss input").click()
    page.get_by_role("option", name="Chamfer").click()
    set_number(page, "points-steps", 10)
    page.locator("#points-run").click()
    wait_until_done(page, "points")
    assert page.evaluate(SHOWN, "points-view") == [1024, 1024]
    assert page.locator("#points-table").get_by_text("Earth mover's").count() >= 1
    told = page.locator("#points-curve svg").get_attribute("aria-label")
    first, last = (float(value) for value in re.search(r"best so far from (\S+) to (\S+)", told).groups())
    assert last < first
    with page.expect_download() as waiting:
        page.locator("#points-ply").click()
    assert waiting.value.suggested_filename == "chair-1-reconstruction.ply"
    waiting.value.save_as(tmp_path / "made.ply")
    assert load_point_cloud(tmp_path / "made.ply").shape == (1024, 3)
    page.locator("#points-python").get_by_role("button").first.click()
    page.locator("#points-python").get_by_text("refine_latents").first.wait_for()
    camera = "document.querySelector('#points-view .js-plotly-plot')._fullLayout.scene._scene.getCamera().eye.x"
    before = page.evaluate(camera)
    box = page.locator("#points-view .js-plotly-plot").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 120, y, steps=4)
    page.mouse.up()
    page.wait_for_function(f"Math.abs({camera} - {before}) > 0.05", timeout=PATIENCE)


def test_an_upload_is_shown_at_once_and_what_is_none_is_refused(page, tmp_path):
    open_points(page)
    save_point_cloud(draw_cloud("mug", 3, 500, test=True), tmp_path / "mug.ply")
    page.locator("#points-file input[type=file]").set_input_files(tmp_path / "mug.ply")
    page.wait_for_function(f"({SHOWN})('points-view')?.[0] === 500", timeout=PATIENCE)
    page.locator("#points-file").get_by_role("button", name=re.compile("clear|remove", re.I)).first.click()
    page.wait_for_function(f"({SHOWN})('points-view')?.[0] === 1024", timeout=PATIENCE)
    (tmp_path / "words.ply").write_text("no cloud")
    page.locator("#points-file input[type=file]").set_input_files(tmp_path / "words.ply")
    page.get_by_text("This file cannot be used").first.wait_for()
    assert "Traceback" not in page.content()


def test_between_two_shapes_and_new_ones_to_the_files(page, tmp_path):
    open_points(page)
    for tab, identity, count in (("Between two shapes", "points-between", 3), ("New shapes", "points-new", 2)):
        page.get_by_role("tab", name=tab, exact=True).click()
        set_number(page, "points-count" if count == 3 else "points-new-count", count)
        page.locator(f"#{identity}-run").click()
        wait_until_done(page, identity)
        page.wait_for_function(f"({SHOWN})('{identity}-view')?.length === {count}", timeout=PATIENCE)
        links = page.locator(f"#{identity}-ply a[download]")
        assert links.count() == count
        with page.expect_download() as waiting:
            links.last.click()
        waiting.value.save_as(tmp_path / f"{identity}.ply")
        assert np.isfinite(load_point_cloud(tmp_path / f"{identity}.ply").numpy()).all()


def test_stopping_a_long_descent_keeps_its_best(page):
    open_points(page)
    page.locator("#points-loss input").click()
    page.get_by_role("option", name=re.compile("Earth")).click()
    set_number(page, "points-steps", 300)
    page.locator("#points-run").click()
    page.locator("#points-status").get_by_text(re.compile(r"Step \d+ of 300")).wait_for(timeout=PATIENCE)
    page.locator("#points-stop").click()
    page.locator("#points-status").get_by_text("Stopped.").wait_for(timeout=PATIENCE)
    page.locator("#points-ply:not([disabled])").wait_for()
