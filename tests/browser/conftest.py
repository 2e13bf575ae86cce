"""The app in a process of its own, and Chromium that looks at it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE = int(os.environ.get("TRIMTAB_PATIENCE", "120")) * 1_000
"""Milliseconds that anything may take, on a machine with much else to do; the variable is in seconds."""
collect_ignore = [] if os.environ.get("TRIMTAB_SCREENSHOTS") else ["test_screenshots.py"]
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="session")
def app(tmp_path_factory) -> Iterator[str]:
    """The address of ``python app.py``, or of one that runs already, named by ``TRIMTAB_APP``."""
    if running := os.environ.get("TRIMTAB_APP"):
        yield running
        return
    folder = tmp_path_factory.mktemp("app")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "gradio"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder),
    }
    url = f"http://127.0.0.1:{port}/"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            _wait_until_answered(url, process, folder / "log")
            yield url
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_answered(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=30).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the app does not answer:\n{log.read_text()}")


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.fail("the browser tests need Chromium: apt install chromium, or its path in CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--enable-unsafe-swiftshader"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(app, chromium) -> Iterator:
    """Opens windows, each with a storage of its own; at the end none may have had an error."""
    contexts, errors = [], []

    def opened(address: str = "", viewport: dict = WIDE, **options):
        context = chromium.new_context(viewport=viewport, **options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(app + address)
        page.get_by_role("tab", name="Create").wait_for()
        page.wait_for_function("window.trimtabPage")  # the page's own code has run: its events are wired
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors


@pytest.fixture
def page(open_page):
    """One window."""
    return open_page()
