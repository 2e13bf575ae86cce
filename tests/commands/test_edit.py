"""``trimtab edit``: from flags and from files, with one line for what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.cli import main
from trimtab.commands.demo_edit import drawn_picture
from trimtab.commands.edit import strip

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

QUICK = ["--steps", "3", "--iterations", "2", "--step-size", "0.1", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline("sd3").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "A cat.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(path)
    return path


def run(*arguments: object) -> int:
    return main(["edit", *map(str, arguments)])


def test_one_edit(model: str, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    prompts = ["--source-prompt", "a red cat", "--prompt", "two dog"]
    assert run(picture, *prompts, "--model", model, "--output", out, *QUICK) == 0
    files = sorted(path.name for path in out.iterdir())
    assert files == ["a-cat-two-dog-strip.png", "a-cat-two-dog.json", "a-cat-two-dog.png", "manifest.jsonl"]
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == [files[2], files[0], files[1]]
    report = json.loads((out / files[1]).read_text())
    assert len(report["residuals"]) == 3 and report["evaluations"] == [4 - 1 + 4, 11, 15]  # 2 of 3 steps, guided
    assert report["picked"] == 2 and report["step_size"] == pytest.approx(0.1) and report["size"] == [20, 12]
    with Image.open(out / files[2]) as image:
        assert image.size == (20, 12) and image.text["prompt"] == "two dog"
    with Image.open(out / files[0]) as image:
        assert image.width > 4 * 20


def test_picked_iterates_differ(model: str, picture: Path, tmp_path: Path) -> None:
    arguments = [picture, "--source-prompt", "a red cat", "--prompt", "two dog", "--model", model, *QUICK]
    images = []
    for pick in (0, 2):
        out = tmp_path / str(pick)
        assert run(*arguments, "--pick", pick, "--output", out) == 0
        images.append(np.asarray(Image.open(out / "a-cat-two-dog.png")))
    assert (images[0] != images[1]).any()


def test_a_mask_keeps_the_rest(model: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:8] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    prompts = ["--source-prompt", "a red cat", "--prompt", "two dog", "--mask", tmp_path / "m.png"]
    assert run(tmp_path / "p.png", *prompts, "--model", model, "--output", tmp_path / "out", *QUICK) == 0
    edited = np.asarray(Image.open(tmp_path / "out" / "p-two-dog.png"))
    assert (edited[8:] == pixels[8:]).all() and (edited[:7] != pixels[:7]).any()


@pytest.mark.slow
def test_blending_by_gradients_on_the_bundled_model(tmp_path: Path) -> None:
    """A whole edit: the pixels outside are the picture's, and inside no step is left at the mask's edge."""
    picture = drawn_picture()
    picture.save(tmp_path / "p.png")
    mask = np.zeros((128, 128), dtype=np.uint8)
    mask[30:100, 30:100] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    results = {}
    for blend in ("none", "feather", "poisson", "poisson-mixed"):
        arguments = [tmp_path / "p.png", "--source-prompt", "a red circle on a sky background"]
        arguments += ["--prompt", "a red circle on a pink background", "--mask", tmp_path / "m.png", "--blend", blend]
        quick = ["--steps", "6", "--iterations", "1", "--step-size", "0.1", "--device", "cpu", "--strength", "1"]
        assert run(*arguments, "--output", tmp_path / blend, *quick) == 0
        (path,) = (path for path in (tmp_path / blend).glob("*.png") if "strip" not in path.name)
        results[blend] = np.asarray(Image.open(path)).astype(int)
    original = np.asarray(picture).astype(int)
    steps = {}
    for blend, image in results.items():
        if blend != "none":
            assert (image[mask == 0] == original[mask == 0]).all(), blend
        steps[blend] = np.abs(np.diff(image[32:98, 29:32], axis=1)).mean()  # across the mask's left edge
    assert (results["poisson"] != results["poisson-mixed"]).any() and (results["poisson"] != results["feather"]).any()
    assert steps["poisson"] < 0.5 * steps["feather"], steps


def test_many_edits_resume(model: str, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = tmp_path / "jobs.jsonl"
    lines = [
        {"image": picture.name, "source_prompt": "a red cat", "prompt": "two dog"},
        {
            "image": picture.name,
            "source_prompt": "a red cat",
            "prompt": "a green apple",
            "strength": 1,
            "iterations": 1,
        },
    ]
    jobs.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    arguments = ["--input", jobs, "--model", model, "--output", tmp_path / "out", *QUICK]
    assert run(*arguments) == 0
    reports = {path.stem: path for path in (tmp_path / "out").glob("*.json")}
    assert set(reports) == {"0000-two-dog", "0001-a-green-apple"}
    second = json.loads(reports["0001-a-green-apple"].read_text())
    assert len(second["residuals"]) == 2 and second["job"]["strength"] == 1

    reports["0000-two-dog"].unlink()  # as if interrupted before the first was finished
    before = reports["0001-a-green-apple"].stat().st_mtime_ns
    capsys.readouterr()
    assert run(*arguments) == 0
    printed = capsys.readouterr()
    assert "1 of 2 edits are in" in printed.err and "0000-two-dog" in printed.out and "apple" not in printed.out
    assert reports["0001-a-green-apple"].stat().st_mtime_ns == before
    assert run(*arguments, "--guidance-scale", "2") == 0  # other settings: made again
    assert reports["0001-a-green-apple"].stat().st_mtime_ns > before


PROMPTS = ["--source-prompt", "a red cat", "--prompt", "two dog"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give IMAGE, --source-prompt, --prompt, or a file of edits with --input"),
        (["{picture}", "--prompt", "a"], "give --source-prompt, or a file"),
        (["none.png", *PROMPTS], "IMAGE takes a picture's file; none.png is none"),
        (["{text}", *PROMPTS], "text.png is no picture that can be read"),
        (["{picture}", *PROMPTS, "--strength", "1.5"], "--strength takes a number in (0, 1]; got 1.5"),
        (["{picture}", *PROMPTS, "--strength", "nan"], "--strength takes a number in (0, 1]; got nan"),
        (["{picture}", *PROMPTS, "--steps", "0"], "--steps takes a whole number, 1 or more; got 0"),
        (["{picture}", *PROMPTS, "--iterations", "-1"], "--iterations takes a whole number, 0 or more; got -1"),
        (["{picture}", *PROMPTS, "--pick", "9"], "--pick takes 0 to 8, its iterations; got 9"),
        (["{picture}", *PROMPTS, "--step-size", "0"], "--step-size takes a finite positive number; got 0.0"),
        (["{picture}", *PROMPTS, "--locality", "0"], "--locality takes a finite positive number"),
        (["{picture}", *PROMPTS, "--acceleration", "newton"], "`acceleration` is 'newton'"),
        (["{picture}", *PROMPTS, "--mask", "none.png"], "--mask takes a picture's file; none.png is none"),
        (["{picture}", *PROMPTS, "--blend", "poisson"], "--blend takes a mask beside it; there is none"),
        (["{picture}", *PROMPTS, "--mask", "{picture}", "--blend", "smear"], "`blend` is 'smear'; takes None, 'none'"),
        (["{picture}", *PROMPTS, "--height", "16"], "`height` is 16 and `width` is None"),
        (["{picture}", "--input", "jobs.jsonl"], "--input has the pictures and prompts; leave IMAGE away"),
        (["--input", "none.jsonl"], "--input takes a JSONL file; none.jsonl"),
        (["--input", "{empty}"], "--input takes a file with a job a line"),
        (["--input", "{broken}"], "broken.jsonl line 1: no JSON"),
        (["--input", "{unknown}"], 'unknown.jsonl line 1: knows no promt; takes image, source_prompt, prompt'),
        (["--input", "{lacking}"], "lacking.jsonl line 1: lacks source_prompt, prompt"),
        (["--input", "{wrong}"], 'wrong.jsonl line 1: "strength" takes a number; got \'much\''),
        (["{picture}", *PROMPTS, "--steps", "many"], "argument --steps: invalid int value: 'many'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(
    model: str, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    good = json.dumps({"image": str(picture), "source_prompt": "a", "prompt": "b"})
    files = {
        "text.png": "no picture",
        "empty.jsonl": "\n",
        "broken.jsonl": "{",
        "unknown.jsonl": json.dumps({"image": "a", "promt": "b"}),
        "lacking.jsonl": json.dumps({"image": "a"}),
        "wrong.jsonl": good[:-1] + ', "strength": "much"}',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    paths = {Path(name).stem: tmp_path / name for name in files} | {"picture": picture}
    out = tmp_path / "out"
    code = run(*(str(a).format(**paths) for a in arguments), "--model", model, "--output", out)
    error = capsys.readouterr().err.strip()
    assert code == 2 and message in error.splitlines()[-1], error
    assert len(error.splitlines()) == 1 and not out.exists()


def test_a_model_that_is_not_edited(tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline("pixart-sigma").save_pretrained(tmp_path / "pixart")
    assert run(picture, *PROMPTS, "--model", tmp_path / "pixart", "--output", tmp_path / "out") == 2
    assert "--model: `pipeline` is a PixArtSigmaPipeline, which isn't edited here" in capsys.readouterr().err


def test_the_strip_shows_every_picture() -> None:
    colours = ["red", "lime", "blue"]
    sheet = strip([Image.new("RGB", (40, 30), colour) for colour in colours], ["a", "b", "a long label"], marked=1)
    seen = {colour for _, colour in sheet.getcolors(100_000)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= seen and sheet.height > 30


def test_the_drawn_picture_is_what_its_prompt_says() -> None:
    pixels = np.asarray(drawn_picture()).astype(int)
    assert pixels.shape == (128, 128, 3)
    red, green, blue = pixels[66, 62]
    assert red > 200 and green < 90 and blue < 90
    red, green, blue = pixels[5, 5]
    assert blue > green > red > 130
