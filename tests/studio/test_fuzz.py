"""Hostile inputs at every endpoint: each is served or refused in words, and no file is written but temporary ones.

What an endpoint takes is read from the app itself, so one that is added is tried too. Runs that are served are of one
step.
"""

import math
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ENDPOINTS = (
    "/create", "/create_grid", "/improve", "/edit", "/reconstruct_points", "/interpolate_points", "/sample_points",
    "/make_pairs", "/choose_picture", "/fit_taste",
)  # fmt: skip
QUICK = {"steps": 1, "iterations": 1, "count": 2, "few_steps": False}
"""What a run that is served is given, unless the value is the hostile one."""
FEWEST = {("/make_pairs", "count"): 4, ("/edit", "iterations"): 0, ("/create_grid", "guidance"): "cfg++"}
"""The same of one endpoint."""

LONGEST = 300
"""Seconds that a request may take; one step takes far less, but for a busy machine."""

OWN = re.compile(r"/(__pycache__|\.hypothesis|matplotlib)(/|$)")

TEXTS = st.one_of(
    st.sampled_from([
        "", " ", "\0", "a" * 5_000, "../../etc/passwd", "/etc/passwd", "C:\\Windows\\win.ini", "file:///etc/passwd",
        "$(touch /root/x)", "`id`", "; rm -rf ~", "' OR 1=1 --", "{{7*7}}", "${jndi:ldap://x}",
        "<script>alert(1)</script>", "\u202e\u2066abc", "🦉" * 300,
        "NaN", "None", "__import__('os').system('id')", "\r\nSet-Cookie: a=b", "%s%n%x", "trust_remote_code",
    ]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
)  # fmt: skip
NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 0.5, -0.0, 1e-320, 1e308, -1e308, 2**31, 2**53 + 1, 2**63, 10**30, math.pi]),
    st.floats(-1e6, -1e-6),
    st.integers(-(10**20), -1),
)
OTHERS = st.sampled_from([None, True, [], {}, [1, 2], {"a": 1}, ["x"] * 50, {"path": "/etc/passwd"}, {"value": "a"}])
FILES = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([
        b"\x89PNG\r\n\x1a\n" + bytes(50), b"GIF89a", b"ply\nformat ascii 1.0\nelement vertex 99\nend_header\n",
        b"glTF\2\0\0\0\xff\0\0\0", b"PK\3\4" + bytes(30), b"\x93NUMPY\1\0", b"OFF\n3 1 0\n", b"<svg onload='x'/>",
        b'8\0\0\0\0\0\0\0{"__metadata__":{"format":"trimtab.personal.1","features":"x"}}',
        b"nan nan nan", b"1 2 3\n" * 3, b"v 0 0 0\n", b"solid a\nendsolid a\n",
    ]),
)  # fmt: skip
ENDINGS = (".png", ".jpg", ".ply", ".obj", ".stl", ".glb", ".npz", ".npy", ".xyz", ".csv", ".off", ".exe", "")
NAMES = st.sampled_from([f"a{ending}" for ending in (*ENDINGS, ".safetensors")])


class WrittenFiles:
    """Paths that this process opened for writing, made, renamed or removed, while it is switched on."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if isinstance(path, (str, bytes, os.PathLike)) and writes:
                self.paths.add(os.fsdecode(path))
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link"):
            self.paths.add(os.fsdecode(arguments[0]))
        elif event == "os.rename":
            self.paths.update(os.fsdecode(path) for path in arguments[:2])

    def outside(self) -> list[str]:
        """Those that are in no temporary folder, nor devices, nor libraries' and tests' own caches."""
        inside = tuple(os.path.realpath(folder) + os.sep for folder in (tempfile.gettempdir(), "/dev", "/proc"))
        found = (os.path.realpath(path) for path in self.paths)
        return sorted(path for path in found if not path.startswith(inside) and not OWN.search(path))


@pytest.fixture(scope="module")
def written():
    hook = WrittenFiles()
    yield hook
    hook.on = False


@pytest.fixture(scope="module")
def client(app_url):
    return Client(app_url, verbose=False)


@pytest.fixture(scope="module")
def usual(client, tmp_path_factory):
    """For each endpoint its parameters: (name, component, a good value)."""
    picture = tmp_path_factory.mktemp("fuzz") / "picture.png"
    Image.new("RGB", (64, 64), "pink").save(picture)
    found = {}
    for name, entry in client.view_api(return_format="dict", print_info=False)["named_endpoints"].items():
        found[name] = []
        for parameter in entry["parameters"]:
            label, component = parameter["parameter_name"], parameter["component"]
            value = FEWEST.get((name, label), QUICK.get(label, parameter.get("parameter_default")))
            if label == "image":
                value = handle_file(picture)
            if label in ("prompt", "source_prompt") and not value:
                value = "a cat on a sky background"
            found[name].append((label, component, value))
    return found


def hostile_value(draw, label: str, component: str, folder: Path):
    """Something for one parameter that nobody should send."""
    if component in ("Picture", "File", "Image") or label in ("image", "mask", "file", "taste"):
        if draw(st.booleans()):
            return draw(OTHERS | TEXTS)
        path = folder / draw(NAMES)
        path.write_bytes(draw(FILES))
        return handle_file(path)
    kinds = [OTHERS, TEXTS] if component in ("Number", "Slider") else [OTHERS, NUMBERS, TEXTS]
    if component in ("Number", "Slider"):
        kinds += [NUMBERS, NUMBERS]
    return draw(st.one_of(kinds))


def refused_in_words(error: AppError) -> None:
    text = str(error)
    assert re.search(r"[A-Za-z]{3}.* [A-Za-z]", text), f"no words: {text!r}"
    for sign in ("Traceback", 'File "', "site-packages", "object at 0x", os.getcwd(), "Error("):
        assert sign not in text, text


def served_or_refused(endpoint: str, examples: int, client, usual, written, folder: Path) -> dict[str, int]:
    """Sends so many hostile requests; counts what became of them."""
    became = {"served": 0, "refused": 0}

    @given(st.data())
    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def request(data) -> None:
        arguments = {label: value for label, _, value in usual[endpoint]}
        chosen = data.draw(st.lists(st.sampled_from(usual[endpoint]), min_size=1, max_size=2, unique_by=lambda p: p[0]))
        for label, component, _ in chosen:
            arguments[label] = hostile_value(data.draw, label, component, folder)
        try:
            client.submit(**arguments, api_name=endpoint).result(timeout=LONGEST)
            became["served"] += 1
        except TimeoutError:
            raise AssertionError(f"no answer after {LONGEST} s to {arguments}") from None
        except AppError as error:
            refused_in_words(error)
            became["refused"] += 1

    written.paths.clear()
    written.on = True
    try:
        request()
    finally:
        written.on = False
    assert written.outside() == []
    return became


def test_every_endpoint_is_tried(usual):
    assert set(usual) == set(ENDPOINTS)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_twenty_hostile_requests(endpoint, client, usual, written, tmp_path):
    became = served_or_refused(endpoint, 20, client, usual, written, tmp_path)
    assert became["refused"] > 0
    assert client.predict(1, 0, api_name="/sample_points")  # and the app goes on


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_five_hundred_hostile_requests(endpoint, client, usual, written, tmp_path):
    became = served_or_refused(endpoint, 500, client, usual, written, tmp_path)
    print(endpoint, became)
    assert became["refused"] > 0
    assert client.predict(1, 0, api_name="/sample_points")


def test_the_watch_on_files_sees_one_outside(written, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "inner"))
    written.paths.clear()
    written.on = True
    (tmp_path / "outside").touch()
    written.on = False
    assert written.outside() == [str(tmp_path / "outside")]
