"""Many visitors at once, on an app in a process of its own: all are served, none gets another's, memory stays flat."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from trimtab.commands.demo_edit import drawn_picture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROOT = Path(__file__).parents[2]
USERS, REQUESTS = 32, 200


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """(address, process) of ``python app.py`` with its default limits."""
    folder = tmp_path_factory.mktemp("app")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("GRADIO_", "TRIMTAB_"))},
        "GRADIO_TEMP_DIR": str(folder / "gradio"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield found[0], process
    finally:
        process.terminate()
        process.wait(30)


def connected(url: str) -> Client:
    return Client(url, verbose=False, httpx_kwargs={"timeout": 300})


def make(client: Client, seed: int) -> tuple[bytes, float]:
    """A picture of two steps as its pixels, and the seconds that it took; checked to be of this seed."""
    began = time.monotonic()
    *_, download, code, status = client.predict(
        f"a cat on a sky background, number {seed}", "", "apg", 10, seed, 2, "bundled", api_name="/create"
    )
    assert "Done" in status and f"manual_seed({seed})" in code
    with Image.open(download["value"] if isinstance(download, dict) else download) as image:
        assert image.text["seed"] == str(seed) and image.text["prompt"].endswith(f" {seed}")
        return image.tobytes(), time.monotonic() - began


def megabytes(process: subprocess.Popen) -> float:
    return psutil.Process(process.pid).memory_info().rss / 2**20


def test_thirty_two_users_at_once_and_two_hundred_requests(app, capsys):
    url, process = app
    idle = megabytes(process)
    with ThreadPoolExecutor(USERS) as pool:
        clients = list(pool.map(lambda _: connected(url), range(USERS)))
        began = time.monotonic()
        first = list(pool.map(make, clients, range(USERS)))
        at_once = time.monotonic() - began
        after_first = megabytes(process)
        began = time.monotonic()
        seeds = [number % USERS for number in range(REQUESTS)]
        more = list(pool.map(make, [clients[seed] for seed in seeds], seeds))
        seconds = time.monotonic() - began
        after_all = megabytes(process)
    assert len({pixels for pixels, _ in first}) == USERS
    assert all(pixels == first[seed][0] for seed, (pixels, _) in zip(seeds, more, strict=True))
    waits = sorted(wait for _, wait in more)
    with capsys.disabled():
        print(
            f"\n{USERS} users at once: all served in {at_once:.1f} s, the longest wait {max(w for _, w in first):.1f} s"
        )
        print(f"{REQUESTS} requests more: {seconds:.1f} s, the median wait {waits[len(waits) // 2]:.1f} s")
        print(f"memory: {idle:.0f} MB idle, {after_first:.0f} MB after {USERS} requests, {after_all:.0f} MB after all")
    assert after_all < 1.1 * after_first


def test_first_previews_come_within_three_seconds_of_the_work(app, tmp_path, capsys):
    """Timed from the first note of the work itself, after loading and waiting."""
    url, _ = app
    client = connected(url)
    make(client, 0)  # the model is there
    drawn_picture().save(tmp_path / "picture.png")
    picture = {"image": handle_file(tmp_path / "picture.png"), "mask": None}
    prompts = {"source_prompt": "a red circle on a sky background", "prompt": "a green circle on a sky background"}
    jobs = {"/improve": {"prompt": "a cat on a sky background"}, "/edit": {**picture, **prompts}}
    for endpoint, arguments in jobs.items():
        job = client.submit(**arguments, api_name=endpoint)
        began = first = None
        for output in job:
            status = output[-1]
            if began is None and not re.search("Waiting|Loading|Starting", status):
                began = time.monotonic()
            if began is not None and shows_preview(endpoint, output):
                first = time.monotonic() - began
                break
        job.cancel()
        with capsys.disabled():
            print(f"\n{endpoint}: first preview {first:.2f} s after the work began")
        assert first is not None and first < 3


def shows_preview(endpoint: str, output: tuple) -> bool:
    """Improve's picture, or an Edit slider whose right side is not the source."""
    if endpoint == "/improve":
        return isinstance(output[0], str)
    both = output[0]
    return isinstance(both, (list, tuple)) and Path(both[0]).read_bytes() != Path(both[1]).read_bytes()
