"""The app's endpoints through gradio_client, on the bundled model in two steps."""

import json
import math
import os
from pathlib import Path

import pytest

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import numpy as np
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from trimtab.commands.demo_edit import drawn_picture
from trimtab.studio import build, launch_options
from trimtab.studio.runs import MODEL

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PROMPT = "a cat on a sky background"


@pytest.fixture(scope="module")
def client():
    before = MODEL.loaded
    page = build()
    assert MODEL.loaded is before  # nothing is loaded before it is used
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield Client(url, verbose=False)
    page.close()


def create(client, **changes):
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": "",
        "guidance": "apg",
        "guidance_scale": 10,
        "seed": 0,
        "steps": 2,
        "model": "bundled",
    }
    return client.predict(api_name="/create", **(arguments | changes))


def test_create_gives_the_picture_that_its_code_makes(client, tmp_path, monkeypatch):
    _, facts, picture, download, code, status = create(client)
    assert facts.count("saturation") == 2 and "Done" in status
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    file = file_of(download)
    ours, theirs = (np.asarray(Image.open(path).convert("RGB")) for path in (file, tmp_path / "picture.png"))
    assert np.array_equal(ours, theirs)
    assert Image.open(file).text["prompt"] == PROMPT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"seed": -1}, "seed|Value -1 is less than minimum"),
        ({"model": "/etc/passwd"}, "not in the list|not allowed"),
    ],
)
def test_bad_settings_are_refused_in_words(client, changes, message):
    with pytest.raises(AppError, match=message) as error:
        create(client, **changes)
    assert "Traceback" not in str(error.value)


def test_edit_gives_every_iterate_and_refuses_what_is_no_picture(client, tmp_path):
    drawn_picture().save(tmp_path / "picture.png")
    (tmp_path / "text.png").write_text("no picture")
    arguments = {
        "source_prompt": "a red circle on a sky background",
        "prompt": "a green circle on a sky background",
        "mask": None,
        "method": "flowopt",
        "strength": 0.8,
        "guidance_scale": 3.5,
        "steps": 2,
        "iterations": 2,
        "model": "bundled",
        "api_name": "/edit",
    }
    result = client.predict(image=handle_file(tmp_path / "picture.png"), **arguments)
    assert len(result[1]) == 3 and "Done" in result[-1]
    with pytest.raises(AppError, match="no picture that can be read"):
        client.predict(image=handle_file(tmp_path / "text.png"), **arguments)


def test_a_cancelled_run_frees_the_model(client):
    job = client.submit(PROMPT, "", "apg", 10, 0, 100, "bundled", api_name="/create")
    while not job.outputs():
        assert not job.done()
    loads = MODEL.loads
    job.cancel()
    assert "Done" in create(client)[-1]
    assert MODEL.loads == loads  # freed, not thrown away


def test_improve_gives_a_better_picture_its_figures_and_the_code(client):
    result = client.predict(
        prompt="three cars on a mint background", iterations=3, seed=109, model="bundled", api_name="/improve"
    )
    best, both, curve, strip, picture, figures, code, status = result
    assert "Done" in status and "at iteration" in status
    assert len(both) == 2 and "best so far from" in curve and "num_optimization_steps=3" in code
    report = json.loads(Path(file_of(figures)).read_text())
    assert len(report["rewards"]) == 3 and len(strip) == sum(
        reward > max(report["rewards"][:step], default=-math.inf) for step, reward in enumerate(report["rewards"])
    )
    with Image.open(file_of(picture)) as image:
        assert json.loads(image.text["settings"])["seed"] == 109
    with pytest.raises(AppError, match="reward takes one of|not in the list"):
        client.predict(prompt=PROMPT, reward="../secret", model="bundled", api_name="/improve")


def file_of(download):
    """Of a button for downloads."""
    return download["value"] if isinstance(download, dict) else download
