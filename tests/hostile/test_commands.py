"""Command lines, lines of JSONL files, prompts and paths: one line of error or whole files, none outside the folder."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.hostile.cases import CASES, tried
from tests.hostile.test_files import JSON
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.cli import main
from trimtab.commands import generate
from trimtab.commands.pictures import slug

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

QUICK = ["--device", "cpu", "--steps", "1", "--guidance", "cfg", "--guidance-scale", "1"]
PATHS = [
    "../up",
    "/etc/passwd",
    "a/../../b",
    "~nobody-here/x",
    "a\0b",
    "x" * 300,
    ".",
    "",
    "/dev/null",
    "loop",
    "link/x",
]
TEXTS = st.text(max_size=20) | st.sampled_from([*PATHS, "\ud800", "\u202e", "a\r\nb", "%s%n", "$(rm)", "-", "--"])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    tiny_pipeline("sd3").save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(model, monkeypatch) -> None:
    """The model is loaded once; all else is as it is."""
    pipe = tiny_pipeline("sd3")
    monkeypatch.setattr(generate, "load_pipeline", lambda *given: pipe)


def snapshot(folder: Path, without: Path) -> dict[str, int]:
    """All files but those in one folder, with their sizes."""
    found = (path for path in folder.rglob("*") if without not in (path, *path.parents))
    return {str(path): path.lstat().st_size for path in found}


def whole(folder: Path) -> list[Path]:
    """The pictures of a folder, which open, and no file that is half written."""
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    for path in files:
        assert not path.name.startswith("."), path
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
    return [path for path in files if path.suffix == ".png"]


COMMANDS = {
    "generate": [
        "--prompt-file",
        "--input",
        "--guidance",
        "--guidance-scale",
        "--steps",
        "--seed",
        "--height",
        "--batch-size",
    ],
    "edit": ["--source-prompt", "--prompt", "--input", "--mask", "--strength", "--iterations", "--step-size", "--pick"],
    "optimize": [
        "--input",
        "--reward",
        "--monitor",
        "--optimizer",
        "--learning-rate",
        "--preset",
        "--seed",
        "--curvature",
    ],
    "reconstruct": ["--input", "--format", "--frames", "--size", "--seed", "--batch-size"],
    "tune": ["--prompt-file", "--judge", "--what", "--evaluations", "--particles"],
    "protect": ["--labels", "--strength", "--resize", "--seed"],
    "export-pipeline": ["--model"],
    "info": [],
    "": ["--version", "generate"],
}


@CASES
def test_command_lines(cases, tmp_path, monkeypatch, capsys):
    """No model can be had, so whatever is asked for ends with one line, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "link").symlink_to("/proc")
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a", "image": "a.png", "source_prompt": "b", "file": "a.ply"}\n')
    before = snapshot(tmp_path, tmp_path / "none")

    @tried(cases)
    @given(st.sampled_from(sorted(COMMANDS)), st.data())
    def holds(command, data):
        values = (
            TEXTS | st.integers(-2, 2**70).map(str) | st.floats().map(str) | st.sampled_from(["jobs.jsonl", "a.json"])
        )
        names = data.draw(
            st.lists(st.sampled_from([*COMMANDS[command], "--output"] if command else ["--x"]), max_size=4)
        )
        options = [part for name in names for part in (name, data.draw(values, label=name))]
        words = data.draw(st.lists(TEXTS, max_size=2))
        lacking = ["--model", "no/such/folder"] if command not in ("info", "") else []
        code = main([*([command] if command else []), *options, *lacking, *(["--", *words] if words else [])])
        captured = capsys.readouterr()
        assert code == 2 or (command in ("info", "") and code == 0) or (code == 1 and captured.err), (command, options)
        if code:
            assert captured.err.startswith("trimtab: error: ") and captured.err.count("\n") == 1, captured.err
        assert snapshot(tmp_path, tmp_path / "none") == before

    holds()


@CASES
def test_lines_of_jsonl_files(cases, loaded, model, tmp_path, capsys):
    """Any lines beside a good one: it is made, and each other is too or has its error in the manifest."""
    keys = st.sampled_from(
        ["id", "prompt", "negative_prompt", "seed", "steps", "guidance", "guidance_scale", "height", "x"]
    )
    values = JSON | TEXTS | st.integers(-1, 3) | st.sampled_from([2**63, 1e308, 16, 18])
    objects = st.dictionaries(keys, values, max_size=4).map(lambda given: {"prompt": "a dog", "steps": 1, **given})
    lines = st.lists(st.builds(json.dumps, objects | JSON) | st.text(max_size=10), max_size=3)
    number = iter(range(10**6))

    @tried(cases)
    @given(lines)
    def holds(lines):
        out = tmp_path / str(next(number)) / "out"
        lines = [line.replace("\n", " ").encode(errors="replace").decode() for line in lines]
        lines = [line for line in lines if '"steps": 3' not in line or "e" not in line]
        file = tmp_path / "jobs.jsonl"
        file.write_text("\n".join(['{"prompt": "a cat"}', *lines]))
        before = snapshot(tmp_path, out.parent)
        code = main(["generate", "--input", str(file), "--model", str(model), *QUICK, "--output", str(out)])
        assert code in (0, 1), capsys.readouterr().err
        records = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
        asked = [line for line in lines if line.strip()]
        assert len(records) == 1 + len(asked) and not records[0]["error"]
        assert all(bool(record["error"]) != bool(record["files"]) for record in records)
        files = {file for record in records for file in record["files"]}
        assert {str(path.relative_to(out)) for path in whole(out)} == files
        assert snapshot(tmp_path, out.parent) == before
        assert code == int(any(record["error"] for record in records))

    holds()


@CASES
def test_prompts(cases, loaded, model, tmp_path):
    """Whatever is to be shown is shown, and said so in the picture."""

    @tried(cases)
    @given(st.text(max_size=200) | TEXTS, st.text(max_size=20), st.integers(-1, 2**63))
    def holds(prompt, negative, seed):
        options = ["--negative-prompt=" + negative, "--seed", str(seed), "--output", str(tmp_path / "out")]
        code = main(["generate", "--model", str(model), *QUICK, *options, "--", prompt])
        usable = prompt.strip() and 0 <= seed < 2**63 and "\ud800" not in prompt
        assert code == (0 if usable else 2), (prompt, seed)
        for path in whole(tmp_path / "out"):
            with Image.open(path) as image:
                assert image.text["prompt"] == prompt
            path.unlink()

    holds()


@CASES
def test_names_of_files(cases):
    @tried(cases)
    @given(st.text() | TEXTS, st.integers(1, 200))
    def holds(text, length):
        name = slug(text, length)
        assert name and Path(name).name == name and not name.startswith((".", "-")) and len(name) <= max(length, 7)
        assert len(name.encode()) <= 144 and name.isprintable()

    holds()


@pytest.mark.parametrize("length", [30_000, pytest.param(10**6, marks=pytest.mark.slow)])
def test_a_prompt_of_a_million_characters(length, loaded, model, tmp_path):
    prompt = ("a cat on a sky background, " * 37_038)[:length]
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"prompt": prompt, "id": "long"}))
    options = ["--input", str(tmp_path / "jobs.jsonl"), "--output", str(tmp_path / "out")]
    assert len(prompt) == length and main(["generate", "--model", str(model), *QUICK, *options]) == 0
    (path,) = whole(tmp_path / "out")
    with Image.open(path) as image:
        assert image.text["prompt"] == prompt


@pytest.mark.parametrize("limit", [0, 100])
def test_a_disk_that_is_full(limit, loaded, model, tmp_path, capsys):
    """The system refuses to write more than so many bytes of a file: one line with the folder's name, nothing half."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code = main(["generate", "--model", str(model), *QUICK, "--output", str(tmp_path / "out"), "--", "a cat"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert code == 1 and str(tmp_path / "out") in error and "File too large" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["generate", "--model", str(model), *QUICK, "--output", str(tmp_path / "out"), "--", "a cat"]) == 0


@pytest.mark.parametrize("output", ["/proc/trimtab", "loop", "loop/x", "picture.png/x"])
def test_a_folder_that_cannot_be_made(output, loaded, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("picture.png")
    code = main(["generate", "--model", str(model), *QUICK, "--output", output, "--", "a cat"])
    error = capsys.readouterr().err
    assert code in (1, 2) and error.startswith("trimtab: error: ") and error.count("\n") == 1
    assert output.split("/x")[0] in error
