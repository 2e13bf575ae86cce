"""The app as a person meets it: from the first click to the file."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from PIL import Image

from trimtab.commands.demo_edit import drawn_picture
from trimtab.commands.pictures import save_png
from trimtab.studio.metadata import made_by

PATIENCE = int(os.environ.get("TRIMTAB_PATIENCE", "120")) * 1_000
DONE = re.compile("Done in")
TABS = ("Create", "Improve", "Edit", "Points", "Taste")


def go_to(page, tab):
    page.get_by_role("tab", name=tab, exact=True).click()


def set_number(page, identity, value):
    """Types a number beside a slider, or into a number's field."""
    field = page.locator(f"#{identity} input[type=number]")
    field.fill(str(value))
    field.press("Enter")
    field.press("Tab")


def wait_for_status(page, tab, text):
    page.locator(f"#{tab}-status").get_by_text(text).wait_for(timeout=PATIENCE)


def download(page, identity, folder):
    with page.expect_download() as waiting:
        page.locator(f"#{identity}").click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def create(page, steps=3):
    set_number(page, "create-steps", steps)
    page.get_by_role("button", name="Make the picture").click()
    wait_for_status(page, "create", DONE)


def test_create_from_an_example_to_the_file(page, tmp_path):
    page.get_by_role("button", name="three strawberries").first.click()
    page.wait_for_function("document.querySelector('#create-prompt textarea')?.value.startsWith('three straw')")
    create(page)
    path = download(page, "create-png", tmp_path)
    with Image.open(path) as image:
        assert image.size == (128, 128)
        assert image.text["prompt"] == "three strawberries on a mint background"
    assert page.locator("#create-facts").inner_text().count("saturation") == 2
    page.get_by_role("button", name="Copy as Python").first.click()
    page.locator("#create-python").get_by_text("three strawberries").wait_for()


def test_improve_to_the_files(page, tmp_path):
    go_to(page, "Improve")
    set_number(page, "improve-iterations", 3)
    page.get_by_role("button", name="Improve", exact=True).click()
    wait_for_status(page, "improve", DONE)
    told = page.locator("#improve-curve svg").get_attribute("aria-label")
    assert re.search(r"best so far from \S+ to \S+", told)
    report = json.loads(download(page, "improve-json", tmp_path).read_text())
    assert len(report["rewards"]) == 3 and max(report["rewards"]) == report["rewards"][report["best_step"]]
    with Image.open(download(page, "improve-png", tmp_path)) as image:
        assert json.loads(image.text["settings"])["iterations"] == 3


def test_stopping_ends_the_work_within_an_iteration_and_keeps_the_best(page, tmp_path):
    go_to(page, "Improve")
    set_number(page, "improve-iterations", 100)
    page.get_by_role("button", name="More settings").locator("visible=true").click()
    page.get_by_label("Fast").uncheck()  # each iteration takes seconds, so that the page keeps up
    page.get_by_role("button", name="Improve", exact=True).click()
    wait_for_status(page, "improve", re.compile("Iteration [2-9] of 100"))
    shown = int(re.search(r"Iteration (\d+)", page.locator("#improve-status").inner_text())[1])
    page.locator("#improve-stop").click()
    wait_for_status(page, "improve", "Stopped.")
    report = json.loads(download(page, "improve-json", tmp_path).read_text())
    assert shown <= len(report["rewards"]) <= shown + 2
    create_begins = time.monotonic()
    go_to(page, "Create")  # the model is free again
    create(page, steps=1)
    assert time.monotonic() - create_begins < 60
    with Image.open(download(page, "create-png", tmp_path)) as image:
        assert image.size == (128, 128)


def test_edit_an_example_and_keep_an_earlier_iterate(page, tmp_path):
    go_to(page, "Edit")
    page.locator("#edit-examples").get_by_role("button").nth(0).click()
    page.locator("#edit-image img").wait_for()
    set_number(page, "edit-iterations", 2)
    page.get_by_role("button", name="More settings").last.click()
    set_number(page, "edit-steps", 4)
    page.get_by_role("button", name="Edit", exact=True).click()
    wait_for_status(page, "edit", DONE)
    assert page.locator("#edit-strip").get_by_role("button").count() >= 3
    set_number(page, "edit-chosen", 1)
    page.get_by_role("button", name="Copy as Python").locator("visible=true").click()
    page.locator("#edit-python").get_by_text("num_optimization_steps=1").wait_for()
    path = download(page, "edit-png", tmp_path)
    assert path.name.endswith("iterate-1.png")
    with Image.open(path) as image:
        assert json.loads(image.text["settings"])["iterations"] == 1


def test_a_picture_goes_from_create_to_edit(page):
    create(page, steps=1)
    page.get_by_role("button", name="Send to Edit").locator("visible=true").click()
    page.locator("#edit-image img").wait_for()
    assert page.get_by_role("tab", name="Edit", exact=True).get_attribute("aria-selected") == "true"


def test_what_is_no_picture_is_refused_in_plain_words(page, tmp_path):
    (tmp_path / "cat.png").write_text("no picture")
    go_to(page, "Edit")
    page.locator("#edit-image input[type=file]").set_input_files(tmp_path / "cat.png")
    page.locator("#edit-image img").wait_for(state="attached")
    page.get_by_label("What it is to show").fill("a cat")
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_text("This file is no picture that can be read").first.wait_for()
    assert "Traceback" not in page.content()


def test_an_empty_prompt_is_refused_in_plain_words(page):
    page.locator("#create-prompt textarea").fill(" ")
    page.get_by_role("button", name="Make the picture").click()
    page.get_by_text("The prompt is empty").first.wait_for()


def test_two_windows_do_not_see_each_other(open_page, tmp_path):
    one, other = open_page(), open_page()
    prompts = ["a cat on a sky background", "a pizza on a pink background"]
    for page, prompt in zip((one, other), prompts, strict=True):
        page.locator("#create-prompt textarea").fill(prompt)
        set_number(page, "create-steps", 2)
    one.get_by_role("button", name="Make the picture").click()
    wait_for_status(one, "create", DONE)
    assert other.locator("#create-slider img").count() == 0
    for page in (one, other):
        page.get_by_role("button", name="Make the picture").click()
    for page, prompt in zip((one, other), prompts, strict=True):
        page.wait_for_timeout(200)
        wait_for_status(page, "create", DONE)
        page.locator("#create-png:not([disabled])").wait_for()
        with Image.open(download(page, "create-png", tmp_path)) as image:
            assert image.text["prompt"] == prompt


def test_settings_survive_a_reload_and_travel_in_the_link(open_page):
    page = open_page()
    page.locator("#create-prompt textarea").fill("a fox on a sand background")
    set_number(page, "create-seed", 7)
    page.wait_for_timeout(500)
    page.reload()
    page.wait_for_function("document.querySelector('#create-seed input')?.value === '7'")
    assert page.locator("#create-prompt textarea").input_value() == "a fox on a sand background"
    page.get_by_role("button", name="Copy link").locator("visible=true").click()
    page.wait_for_function("location.search.includes('seed=7')")
    link = page.url
    stranger = open_page(link.split("/", 3)[3])
    stranger.wait_for_function("document.querySelector('#create-seed input')?.value === '7'")
    assert stranger.locator("#create-prompt textarea").input_value() == "a fox on a sand background"


def drop_file(page, path: Path):
    """Drops a file on the page's head."""
    data = page.evaluate_handle(
        """([bytes, name]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, { type: 'image/png' }));
            return data;
        }""",
        [list(path.read_bytes()), path.name],
    )
    for kind in ("dragover", "drop"):
        page.locator("#head").dispatch_event(kind, {"dataTransfer": data})


@pytest.mark.parametrize("how", ["dropped", "opened"])
def test_a_picture_made_here_gives_its_settings_back(page, tmp_path, how):
    settings = {"prompt": "a lion on a night background", "seed": 42, "iterations": 5, "colour": "none"}
    save_png(drawn_picture(), tmp_path / "lion.png", made_by("improve", settings))
    if how == "dropped":
        drop_file(page, tmp_path / "lion.png")
    else:
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Open a file made here").click()
        chooser.value.set_files(tmp_path / "lion.png")
    page.wait_for_function("document.querySelector('#improve-seed input')?.value === '42'")
    assert page.get_by_role("tab", name="Improve").get_attribute("aria-selected") == "true"
    assert page.locator("#improve-prompt textarea").input_value() == settings["prompt"]
    drawn_picture().save(tmp_path / "plain.png")
    drop_file(page, tmp_path / "plain.png")
    page.get_by_text("says nothing of how it was made").first.wait_for()


def test_a_painted_mask_holds(page, tmp_path):
    """What lies outside of the paint stays as it was."""
    go_to(page, "Edit")
    page.locator("#edit-examples").get_by_role("button").nth(0).click()
    page.locator("#edit-image img").wait_for()
    page.get_by_role("button", name="Change a part only").click()
    canvas = page.locator("#edit-painter canvas").first
    canvas.wait_for()
    page.wait_for_timeout(2000)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.5 * box["height"], steps=5)
    page.mouse.up()
    page.locator("#edit-mask img").wait_for()
    set_number(page, "edit-iterations", 0)
    page.get_by_role("button", name="More settings").last.click()
    set_number(page, "edit-steps", 3)
    page.get_by_role("button", name="Edit", exact=True).click()
    wait_for_status(page, "edit", DONE)
    with Image.open(download(page, "edit-png", tmp_path)) as image:
        assert image.crop((90, 0, 128, 30)).getpixel((20, 10)) == pytest.approx(
            drawn_picture().crop((90, 0, 128, 30)).getpixel((20, 10)), abs=12
        )


def test_a_phone_never_scrolls_sideways(open_page):
    from tests.browser.conftest import PHONE

    page = open_page(viewport=PHONE, has_touch=True, is_mobile=True)
    for tab in TABS:
        go_to(page, tab)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], tab
    go_to(page, "Create")
    create(page, steps=1)
    box = page.locator("#create-slider img").first.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]


def test_the_keyboard_is_enough(page):
    page.locator("#create-prompt textarea").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("a star on a white background")
    for _ in range(12):  # past the examples
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "create-run":
            break
    page.keyboard.press("Enter")
    wait_for_status(page, "create", DONE)
    handle = page.locator("#create-slider [role=slider]")
    handle.focus()
    at = int(handle.get_attribute("aria-valuenow"))
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"document.querySelector('#create-slider [role=slider]').ariaValueNow > {at}")
    page.get_by_role("tab", name="Create").focus()
    for tab in TABS[1:]:
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.get_by_role("tab", name=tab, exact=True).get_attribute("aria-selected") == "true"


NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, select, img, [role=slider]')]
    .filter((e) => e.offsetParent && e.type !== 'file' && e.getAttribute('aria-hidden') !== 'true')
    .filter((e) => !(e.ariaLabel || e.title || e.alt || e.textContent.trim() || e.labels?.[0]?.textContent.trim()
        || document.getElementById(e.getAttribute('aria-labelledby'))?.textContent))
    .map((e) => e.outerHTML.slice(0, 200))"""


def test_screen_readers_have_a_name_for_everything(page):
    create(page, steps=1)
    for tab in TABS:
        go_to(page, tab)
        page.wait_for_timeout(300)
        assert page.evaluate(NAMELESS) == [], tab
