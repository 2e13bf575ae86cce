"""The Taste tab as a person meets it: from the first pair to a picture improved by the own taste."""

import re

from PIL import Image

from tests.browser.test_app import PATIENCE, download, go_to, set_number, wait_for_status
from trimtab.rewards import PersonalReward, load_reward

CHOICES = "#taste-facts [role=status]"


def make_pictures(page, count):
    go_to(page, "Taste")
    set_number(page, "taste-count", count)
    page.locator("#taste-run").click()
    page.locator("#taste-left-picture img").wait_for()


def wait_for_choices(page, count):
    page.wait_for_function(
        f"document.querySelector('{CHOICES}')?.textContent.startsWith('{count} choice')", timeout=PATIENCE
    )


def choose(page, count, start=0):
    """So many choices in turn of the left, the right, and by the keyboard."""
    for number in range(start, start + count):
        if number % 3 == 2:
            page.keyboard.press("ArrowLeft")
        else:
            page.locator(f"#taste-{'left' if number % 3 else 'right'}").click()
        wait_for_choices(page, number + 1)


def test_from_the_first_pair_to_a_picture_improved_by_the_own_taste(page, tmp_path):
    make_pictures(page, 6)
    assert page.locator("#taste-file").is_disabled() and page.locator("#taste-to-improve").is_disabled()
    first = page.locator("#taste-left-picture img").get_attribute("src")
    choose(page, 1)
    assert page.locator("#taste-left-picture img").get_attribute("src") != first
    page.locator("#taste-right-picture img").click()  # the picture itself chooses as its button does
    wait_for_choices(page, 2)
    choose(page, 1, start=2)
    page.get_by_text("From 4 on your taste is fitted").wait_for()
    choose(page, 2, start=3)
    page.locator("#taste-learnt").get_by_text("Fitted to 5 choices").wait_for()
    page.locator("#taste-undo").click()
    wait_for_choices(page, 4)
    page.locator("#taste-neither").click()
    page.locator("#taste-learnt").get_by_text("Fitted to 4 choices").wait_for()
    page.wait_for_function("document.querySelectorAll('#taste-ranking .thumbnail-item').length >= 4")
    path = download(page, "taste-file", tmp_path)
    assert path.name == "taste.safetensors" and isinstance(load_reward(path), PersonalReward)

    page.locator("#taste-to-improve").click()
    page.wait_for_function("document.querySelector('#improve-reward input')?.value.includes('taste')")
    assert page.get_by_role("tab", name="Improve").get_attribute("aria-selected") == "true"
    set_number(page, "improve-iterations", 2)
    page.locator("#improve-run").click()
    wait_for_status(page, "improve", re.compile("Reward .* at iteration"))
    page.locator("#improve-python").get_by_role("button").first.click()
    page.locator("#improve-python").get_by_text('load_reward("taste.safetensors")').wait_for()
    with Image.open(download(page, "improve-png", tmp_path)) as image:
        assert '"reward": "taste"' in image.text["settings"]


def test_a_taste_survives_a_reload_and_is_nobody_elses(open_page, tmp_path):
    page = open_page()
    make_pictures(page, 4)
    choose(page, 4)
    page.locator("#taste-file:not([disabled])").wait_for()
    before = download(page, "taste-file", tmp_path).read_bytes()
    page.wait_for_timeout(500)
    page.reload()
    go_to(page, "Taste")
    assert page.locator("#taste-count input[type=number]").input_value() == "4"
    page.locator("#taste-file:not([disabled])").wait_for()
    assert download(page, "taste-file", tmp_path).read_bytes() == before
    other = open_page("?tab=improve&reward=taste")
    go_to(other, "Taste")
    other.wait_for_timeout(1000)
    assert other.locator("#taste-file").is_disabled()
    go_to(other, "Improve")
    other.locator("#improve-run").click()
    other.get_by_text("There is no taste yet").first.wait_for()


def test_a_taste_from_a_file_and_what_is_none(page, tmp_path):
    make_pictures(page, 4)
    choose(page, 4)
    page.locator("#taste-file:not([disabled])").wait_for()
    path = download(page, "taste-file", tmp_path)
    (tmp_path / "words.safetensors").write_text("no taste")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Open a taste").click()
    chooser.value.set_files(tmp_path / "words.safetensors")
    page.get_by_text("This file is no taste made here").first.wait_for()
    go_to(page, "Improve")
    page.locator("#improve-my-taste").get_by_role("button").first.click()
    page.locator("#improve-taste").get_by_role("button", name=re.compile("clear|remove", re.I)).first.click()
    page.locator("#improve-taste input[type=file]").set_input_files(path)
    page.locator("#improve-taste").get_by_text("taste").first.wait_for()
