"""The repository as a Hugging Face Space, built and started as the builder does."""

import gc
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import trimesh
from gradio_client import Client, handle_file
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROOT = Path(__file__).parents[1]
TITLE = "the copy of trimtab"
"""Written into the copy's code, so that no other code can have made the page."""
LONGEST_START = 10.0
"""Seconds of computing from the start to the first page."""


def front_matter() -> dict[str, str]:
    """The settings at the head of the README, which are flat."""
    head = (ROOT / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    return {
        name: value.strip().strip('"') for name, value in (line.split(":", 1) for line in head.splitlines() if line)
    }


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """What the builder copies: the files that are or would be under version control, and nothing else."""
    folder = tmp_path_factory.mktemp("app")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:  # an unpacked archive
        names = [
            str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts
        ]
    else:
        names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shell = folder / "trimtab" / "studio" / "shell.py"
    shell.write_text(shell.read_text(encoding="utf-8").replace('title="trimtab"', f'title="{TITLE}"'), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with requirements.txt, gradio and what these need in turn, and nothing else that is installed here."""
    folder = tmp_path_factory.mktemp("installed")
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line) for line in [*lines, "gradio"] if line and not line.startswith("#")]
    found: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        for extra in {"", *requirement.extras}:
            name = canonicalize_name(requirement.name)
            if (name, extra) in found:
                continue
            found.add((name, extra))
            distribution = metadata.distribution(name)
            needs = map(Requirement, distribution.requires or [])
            wanted += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
            for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
                if not (folder / top).exists():
                    (folder / top).symlink_to(distribution.locate_file(top))
    return folder


def address(app: subprocess.Popen, log: Path) -> str:
    """Where the app says that it is."""
    while app.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            return found[0]
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def test_requirements_are_met_where_there_is_no_repository(tmp_path):
    """The builder installs them in an empty folder, with gradio at the version of the README in the same call."""
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    gradio = f"gradio=={front_matter()['sdk_version']}"
    options = ["--dry-run", "--no-index", "--quiet", "--disable-pip-version-check", "--no-build-isolation"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "-r", "requirements.txt", gradio],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


def test_the_readme_tells_the_builder_what_it_needs():
    told = front_matter()
    assert told["sdk"] == "gradio" and told["app_file"] == "app.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", told["sdk_version"]) and re.fullmatch(r"3\.\d+", told["python_version"])
    assert {"title", "emoji", "colorFrom", "colorTo", "license", "short_description"} <= set(told)
    assert len(told["short_description"]) <= 60


def test_the_space_starts_and_works(copy, installed, tmp_path, capsys):
    """``python app.py`` in the copy, with what requirements.txt names and no installed trimtab to be found."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("GRADIO_", "TRIMTAB_"))},
        "PYTHONPATH": str(installed),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_TEMP_DIR": str(tmp_path / "gradio"),
        "HF_HUB_OFFLINE": "1",
    }
    before = {path for path in copy.rglob("*") if path.is_file()}
    began = time.monotonic()
    # -S: no site-packages by itself, so no editable install that would find another checkout.
    with (tmp_path / "log").open("w") as log:
        app = subprocess.Popen([sys.executable, "-S", "app.py"], cwd=copy, env=environment, stdout=log, stderr=log)
    try:
        url = address(app, tmp_path / "log")
        with urllib.request.urlopen(url, timeout=60) as page:
            assert TITLE.encode() in page.read()
        wall = time.monotonic() - began
        times = psutil.Process(app.pid).cpu_times()
        client = Client(url, verbose=False)
        prompt = "a cat on a sky background"
        *_, download, _, status = client.predict(prompt, "", "apg", 10, 0, 2, "bundled", api_name="/create")
        box = tmp_path / "box.glb"
        trimesh.creation.box((1, 2, 3)).export(box)
        statuses = [
            status,
            client.predict(prompt, iterations=1, steps=1, api_name="/improve")[-1],
            client.predict(file=handle_file(box), loss="earth_movers", steps=1, api_name="/reconstruct_points")[-1],
            client.predict(count=1, api_name="/sample_points")[-1],
        ]
    finally:
        app.terminate()
        app.wait(30)
    assert all("Done" in status for status in statuses)
    assert Image.open(download["value"] if isinstance(download, dict) else download).text["seed"] == "0"
    after = {path for path in copy.rglob("*") if path.is_file() and path.suffix != ".pyi"}  # gradio's own
    assert after == before
    computing = times.user + times.system
    del client
    gc.collect()  # its sockets, of which a warning is no error here
    with capsys.disabled():
        print(f"\nfirst page after {wall:.1f} s, {computing:.1f} s of computing")
    assert min(wall, computing) <= LONGEST_START


def test_the_page_needs_none_of_the_models_libraries():
    code = "import sys; from trimtab.studio import build; build(); print({'torch', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "set()"
