"""Pictures of the page for the documentation: `TRIMTAB_SCREENSHOTS=1 make test-browser` draws them anew into docs/."""

import io
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

DOCS = Path(__file__).parents[2] / "docs"
DONE = re.compile("Done in")
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def shoot(page, name):
    """Writes the whole page in 256 colours, under a temporary name at first."""
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement?.blur()")
    page.wait_for_timeout(1000)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True, animations="disabled"))).convert("RGB")
    DOCS.mkdir(exist_ok=True)
    temporary = DOCS / f".{name}.png"
    picture.quantize(256, dither=Image.Dither.NONE).save(temporary, optimize=True)
    os.replace(temporary, DOCS / f"{name}.png")


def run(page, tab, identity):
    page.get_by_role("tab", name=tab, exact=True).click()
    page.locator(f"#{identity}-run").click()
    page.locator(f"#{identity}-status").get_by_text(DONE).wait_for(timeout=300_000)


def test_create(open_page):
    page = open_page()
    run(page, "Create", "create")
    shoot(page, "app-create")


def test_create_on_a_phone(open_page):
    page = open_page(viewport=PHONE, color_scheme="dark", has_touch=True, is_mobile=True)
    run(page, "Create", "create")
    shoot(page, "app-phone")


def test_improve(open_page):
    page = open_page(color_scheme="dark")
    run(page, "Improve", "improve")
    shoot(page, "app-improve")


def test_edit(open_page):
    page = open_page()
    page.get_by_role("tab", name="Edit", exact=True).click()
    page.locator("#edit-examples").get_by_role("button").nth(1).click()
    page.locator("#edit-image img").wait_for()
    run(page, "Edit", "edit")
    shoot(page, "app-edit")


def test_points(open_page):
    page = open_page()
    run(page, "Points", "points")
    shoot(page, "app-points")


def test_taste(open_page):
    """Of a person who likes warm colours."""
    page = open_page()
    page.get_by_role("tab", name="Taste", exact=True).click()
    page.locator("#taste-run").click()
    page.locator("#taste-left-picture img").wait_for()
    for number in range(20):
        warmth = {}
        for side in ("left", "right"):
            source = page.locator(f"#taste-{side}-picture img").get_attribute("src")
            pixels = np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB"))
            warmth[side] = pixels[..., 0].mean() - pixels[..., 2].mean()
        page.locator(f"#taste-{max(warmth, key=warmth.get)}").click()
        page.locator("#taste-facts").get_by_text(f"{number + 1} choice").wait_for()
        if number >= 3:
            page.locator("#taste-learnt").get_by_text(f"Fitted to {number + 1} choices").wait_for()
    page.locator("#taste-status").get_by_text(DONE).wait_for(timeout=300_000)
    shoot(page, "app-taste")
