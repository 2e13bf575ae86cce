"""Several visitors at once: each gets the own picture, and what goes wrong for one is nobody else's."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
THINGS = ("cat", "owl", "panda", "rocket", "car", "star")


def make(client: Client, seed: int, prompt: str = "a cat on a sky background", steps: int = 2) -> Image.Image:
    """A picture by the endpoint; checked to be made of these very settings."""
    *_, download, code, status = client.predict(
        prompt, "", "apg", 10, seed, steps, "bundled", api_name="/create"
    )  # fmt: skip
    assert "Done" in status and f"manual_seed({seed})" in code
    path = download["value"] if isinstance(download, dict) else download
    image = Image.open(path)
    assert image.text["prompt"] == prompt and image.text["seed"] == str(seed)
    return image


def test_each_visitor_gets_the_own_picture_and_errors_stop_nobody(app_url, tmp_path):
    """Six with pictures and two whose requests are refused, all from one moment on."""
    wanted = {}
    alone = Client(app_url, verbose=False)
    for seed, thing in enumerate(THINGS):
        wanted[seed] = np.asarray(make(alone, seed, f"a {thing} on a sky background"))
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "bad.ply").write_text("no cloud")
    clients = [Client(app_url, verbose=False) for _ in range(8)]
    together = threading.Barrier(8)

    def visit(number: int):
        together.wait(60)
        if number == 6:
            with pytest.raises(AppError, match="no picture that can be read"):
                clients[number].predict(image=handle_file(tmp_path / "bad.png"), prompt="a cat", mask=None,
                                        api_name="/edit")  # fmt: skip
        elif number == 7:
            with pytest.raises(AppError, match="cannot be used"):
                clients[number].predict(file=handle_file(tmp_path / "bad.ply"), api_name="/reconstruct_points")
        else:
            return np.asarray(make(clients[number], number, f"a {THINGS[number]} on a sky background"))
        return None

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(visit, range(8)))
    for seed in wanted:
        assert np.array_equal(made[seed], wanted[seed])
    assert len({picture.tobytes() for picture in wanted.values()}) == len(wanted)


def test_a_visitor_who_leaves_frees_the_model_for_the_next(app_url):
    """The first has a hundred steps and cancels after an update; the second waits for that alone."""
    first, second = (Client(app_url, verbose=False) for _ in range(2))
    long = first.submit("a cat on a sky background", "", "apg", 10, 0, 100, "bundled", api_name="/create")
    while not long.outputs():
        assert not long.done()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(make, second, 1)
        long.cancel()
        waiting.result(120)
    assert "Done" not in long.outputs()[-1][-1]
