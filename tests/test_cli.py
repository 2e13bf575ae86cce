"""The command line on a tiny random Stable Diffusion 3: what it writes, and what it says to bad input."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline as SD3
from PIL import Image

import trimtab
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.cli import main
from trimtab.commands import sampling
from trimtab.commands.pictures import slug
from trimtab.guidance import GUIDERS, RESCALE_RMS, AdaptiveProjectedGuidance, attach, make_guider
from trimtab.pipelines.vocabulary import unknown_words

TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    tiny_pipeline("sd3").save_pretrained(folder)
    return folder


def generate(model: Path | str, *options: str) -> int:
    quick = ["--guidance", "cfg", "--guidance-scale", "4", "--steps", "2", "--device", "cpu"]
    return main(["generate", *quick, "--model", str(model), *options])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "made" / "here"


def test_pictures_carry_what_made_them(model, output, capsys):
    assert generate(model, "--num-images", "2", "--seed", "5", "--output", str(output), "--", "a cat") == 0
    lines = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [5, 6]
    assert sorted(path.name for path in output.iterdir()) == sorted(
        ["manifest.jsonl", *(line["files"][0] for line in lines)]
    )
    assert capsys.readouterr().out.splitlines() == [str(output / line["files"][0]) for line in lines]
    for line in lines:
        with Image.open(output / line["files"][0]) as image:
            assert image.size == (16, 16)
            assert image.text["prompt"] == line["settings"]["prompt"] == "a cat"
            assert int(image.text["seed"]) == line["seed"]
            made_by = json.loads(image.text["settings"])
            assert (made_by["guidance_scale"], made_by["width"], made_by["device"]) == (4.0, 16, "cpu")
            assert line["settings"]["guidance_scale"] == 4.0 and line["figures"]["width"] == 16


def test_a_batch_gives_what_its_items_give(model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    options = ["--num-images", "2", "--batch-size"]
    assert generate(model, "--prompt-file", str(prompts), *options, "3", "--output", str(tmp_path / "b")) == 0
    assert generate(model, "--seed", "1", "--output", str(tmp_path / "one"), "--", "a dog") == 0
    (alone,) = (tmp_path / "one").glob("*.png")
    batched = {path.name: pixels(path) for path in (tmp_path / "b").glob("*.png")}
    assert sorted(batched) == [
        "0000-a-cat-cfg-4-seed0.png",
        "0000-a-cat-cfg-4-seed1.png",
        "0001-a-dog-cfg-4-seed0.png",
        "0001-a-dog-cfg-4-seed1.png",
    ]
    # One grey level: a batched matrix product sums in another order.
    assert abs(batched["0001-a-dog-cfg-4-seed1.png"] - pixels(alone)).max() <= 1
    assert abs(batched["0001-a-dog-cfg-4-seed0.png"] - pixels(alone)).max() > 8


def test_options_reach_the_pipeline(model, tmp_path):
    def mean_of(*options: str) -> np.ndarray:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        assert generate(model, *options, "--output", str(folder), "--", "a cat") == 0
        (path,) = folder.glob("*.png")
        return pixels(path)

    plain = mean_of()
    assert (plain == mean_of()).all()
    assert mean_of("--height", "24", "--width", "32").shape == (24, 32, 3)
    for options in (
        ("--guidance-scale", "9"),
        ("--negative-prompt", "a dog"),
        ("--steps", "3"),
        ("--seed", "1"),
    ):
        assert (mean_of(*options) != plain).any(), options


def test_the_guidance_names_are_those_of_the_guiders():
    assert sampling.guidance_names() == ["cfg", *sorted(set(GUIDERS) - {"cfg"})]


@pytest.mark.parametrize("name", sampling.guidance_names())
def test_each_guidance_name_works_and_leaves_the_pipeline_clean(name, model):
    pipe = SD3.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    scale = 0.5 if name == "cfg++" else 8.0  # its scale is a share
    sampling.check_guidance(name, scale)
    first, again = (
        sampling.sample(pipe, ["a cat"], [0], guidance=name, guidance_scale=scale, steps=3)[0] for _ in range(2)
    )
    assert first.tobytes() == again.tobytes()
    plain = sampling.sample(pipe, ["a cat"], [0], guidance="cfg", guidance_scale=8.0, steps=3)[0]
    options = {"num_inference_steps": 3, "max_sequence_length": 16}
    expected = pipe("a cat", guidance_scale=8.0, generator=torch.Generator().manual_seed(0), **options).images[0]
    assert plain.tobytes() == expected.tobytes()
    if name == "apg":
        assert first.tobytes() != plain.tobytes()
        guider = AdaptiveProjectedGuidance(8.0, adaptive_projected_guidance_rescale_rms=RESCALE_RMS)
        generator = torch.Generator().manual_seed(0)
        with attach(pipe, guider):
            expected = pipe("a cat", guidance_scale=8.0, generator=generator, **options).images[0]
        assert first.tobytes() == expected.tobytes()


def test_each_rule_has_a_scale_of_its_own(model, output):
    """The same number for all would be refused by CFG++, whose scale is a share, and far too much for others."""
    scales = {name: sampling.check_guidance(name) for name in sampling.guidance_names()}
    assert 0 < scales["cfg++"] <= 1 < scales["autoguidance"] < scales["cfg"] < scales["apg"]
    for name, scale in scales.items():
        assert sampling.check_guidance(name, scale) == scale
    quick = ["--model", str(model), "--guidance", "cfg++", "--steps", "2", "--output", str(output)]
    assert main(["generate", *quick, "--", "a cat"]) == 0
    (line,) = (output / "manifest.jsonl").read_text().splitlines()
    assert json.loads(line)["settings"]["guidance_scale"] == scales["cfg++"]


def test_a_model_with_a_preset_gets_it():
    guider = make_guider("apg", 4.0, SimpleNamespace(name_or_path="somewhere/emoji-scenes"))
    assert guider.config == AdaptiveProjectedGuidance.from_preset("emoji-scenes", guidance_scale=4.0).config
    for pipe in (None, SimpleNamespace(name_or_path=None), SimpleNamespace(name_or_path="somewhere/else")):
        assert make_guider("apg", 4.0, pipe).rescale_rms == RESCALE_RMS


@pytest.mark.parametrize("guidance", ["cfg", "apg"])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux", "qwen-image"])
def test_other_families_work_and_obey_the_scale(family, guidance, tmp_path):
    tiny_pipeline(family).save_pretrained(tmp_path / "model")
    size = ("--height", "16", "--width", "16")
    made = []
    for scale in ("2", "9"):
        options = (
            "--guidance",
            guidance,
            "--guidance-scale",
            scale,
            *size,
            "--output",
            str(tmp_path / scale),
        )
        assert generate(tmp_path / "model", *options, "--", "a cat") == 0
        (path,) = (tmp_path / scale).glob("*.png")
        made.append(pixels(path))
    assert made[0].shape == (16, 16, 3)
    assert (made[0] != made[1]).any()


def test_sizes_that_only_the_loaded_pipeline_tells(tmp_path, output, capsys):
    tiny_pipeline("flux").save_pretrained(tmp_path / "model")
    options = ("--height", "18", "--output", str(output))
    _assert_one_line(generate(tmp_path / "model", *options, "--", "a cat"), "a multiple of 4", capsys)


def test_unknown_words_are_named_once(model, output, capsys):
    filters = list(warnings.filters)
    options = ("--negative-prompt", "a gnu", "--output", str(output))
    assert generate(model, *options, "--", "a zebra on a zebra", "a quagga") == 0
    assert capsys.readouterr().err.count("does not know zebra, quagga, gnu\n") == 1
    assert warnings.filters == filters
    pipe = SD3.from_pretrained(model)
    assert unknown_words(pipe, "a cat on a sky background") == []
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        setattr(pipe, name, None)  # a model that splits words knows them all
    assert unknown_words(pipe, "a zebra") == []


def _truncated(model: Path, tmp_path: Path) -> Path:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    return broken


BAD = {
    "no prompt": ([], "at least one PROMPT"),
    "blank prompt": (["a cat", " "], "prompt 2 is blank"),
    "unknown guidance": (["a cat", "--guidance", "apgg"], "takes one of cfg, "),
    "a scale that the rule refuses": (["a cat", "--guidance", "cfg++"], "--guidance cfg++ refuses --guidance-scale"),
    "negative scale": (["a cat", "--guidance-scale", "-1"], "0 or more; got -1"),
    "NaN scale": (["a cat", "--guidance-scale", "nan"], "0 or more; got nan"),
    "infinite scale": (["a cat", "--guidance-scale", "inf"], "0 or more; got inf"),
    "scale no number": (["a cat", "--guidance-scale", "high"], "0 or more; got 'high'"),
    "odd height": (["a cat", "--height", "66"], "--height takes a multiple of 4"),
    "odd width": (["a cat", "--width", "3"], "--width takes a multiple of 4 for this model (4, say); got 3"),
    "negative width": (["a cat", "--width", "-64"], "1 or more; got -64"),
    "no steps": (["a cat", "--steps", "0"], "1 or more; got 0"),
    "negative seed": (["a cat", "--seed", "-1"], "from 0 to"),
    "no device": (["a cat", "--device", "warp"], "--device warp"),
    "unknown dtype": (["a cat", "--dtype", "int4"], "--dtype"),
    "unknown option": (["a cat", "--colour"], "--colour"),
    "no model": (["a cat", "--model", "/no/such/folder"], "/no/such/folder does not exist"),
    "no Hub model": (["a cat", "--model", "nobody/nothing"], "nobody/nothing"),
    "no prompt file": (["--prompt-file", "/no/such/file"], "/no/such/file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_written(name, model, output, capsys):
    options, words = BAD[name]
    split = next((i for i, option in enumerate(options) if option.startswith("--")), len(options))
    arguments = [*options[split:], "--output", str(output), "--", *options[:split]]
    _assert_one_line(generate(model, *arguments), words, capsys)
    assert not output.parent.exists()


def _assert_one_line(code: int, words: str, capsys) -> None:
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("trimtab: error: ") and captured.err.count("\n") == 1
    assert words in captured.err


def test_a_folder_that_is_no_model(tmp_path, output, capsys):
    (tmp_path / "plain").mkdir()
    _assert_one_line(generate(tmp_path / "plain", "--output", str(output), "--", "a cat"), "model_index.json", capsys)
    (tmp_path / "plain" / "model_index.json").write_text("{]")
    _assert_one_line(generate(tmp_path / "plain", "--output", str(output), "--", "a cat"), "is no JSON", capsys)
    file = tmp_path / "plain" / "model_index.json"
    _assert_one_line(generate(file, "--output", str(output), "--", "a cat"), "is a file", capsys)
    assert not output.parent.exists()


def test_a_model_of_something_else(model, tmp_path, output, capsys):
    other = diffusers.DDPMPipeline(diffusers.UNet2DModel(**TINY_UNET), diffusers.DDPMScheduler())
    other.save_pretrained(tmp_path / "other")
    options = ("--output", str(output), "--", "a cat")
    _assert_one_line(generate(tmp_path / "other", *options), "DDPMPipeline, which is in no family", capsys)
    assert not output.parent.exists()


def test_a_truncated_safetensors_file(model, tmp_path, output, capsys):
    broken = _truncated(model, tmp_path)
    code = generate(broken, "--output", str(output), "--", "a cat")
    _assert_one_line(code, "diffusion_pytorch_model.safetensors is no whole safetensors file", capsys)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    for size in (100, 4, 0):
        os.truncate(weights, size)
        code = generate(broken, "--output", str(output), "--", "a cat")
        _assert_one_line(code, "is no whole safetensors file", capsys)
    weights.unlink()
    _assert_one_line(generate(broken, "--output", str(output), "--", "a cat"), "cannot be loaded", capsys)
    assert not output.parent.exists()


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_an_output_that_is_a_file(below, model, tmp_path, capsys):
    file = tmp_path / "taken"
    file.write_text("mine")
    _assert_one_line(generate(model, "--output", str(file / below), "--", "a cat"), f"{file} is a file", capsys)
    assert file.read_text() == "mine"


def test_a_failed_write_leaves_nothing(model, output, capsys, monkeypatch):
    def full_disk(self, file, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    assert generate(model, "--output", str(output), "--", "a cat") == 1
    assert f"{output} cannot be written: [Errno 28] No space left" in capsys.readouterr().err
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(KeyboardInterrupt(), 130, "interrupted"), (MemoryError("too many"), 1, "error: too many")],
)
def test_what_was_finished_is_kept(error, code, words, model, output, capsys, monkeypatch):
    calls, sample = [], sampling.sample

    def second_fails(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return sample(*arguments, **options)

    monkeypatch.setattr(sampling, "sample", second_fails)
    options = ("--num-images", "3", "--batch-size", "1", "--output", str(output))
    assert generate(model, *options, "--", "a cat") == code
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in output.iterdir()) == ["0000-a-cat-cfg-4-seed0.png", "manifest.jsonl"]


def test_too_little_memory_is_said(model, capsys, output, monkeypatch):
    def no_memory(self, *arguments, **options):
        raise torch.OutOfMemoryError("tried to allocate 8 GiB")

    monkeypatch.setattr(SD3, "encode_prompt", no_memory)
    assert generate(model, "--num-images", "3", "--output", str(output), "--", "a cat") == 1
    assert "3 pictures at once are too many" in capsys.readouterr().err
    assert not output.exists()


def test_not_finite_pictures_are_refused(model, output, capsys, tmp_path):
    poisoned = tmp_path / "poisoned"
    pipe = SD3.from_pretrained(model)
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    pipe.save_pretrained(poisoned)
    assert generate(poisoned, "--output", str(output), "--", "a cat") == 1
    assert "not finite" in capsys.readouterr().err
    assert not output.exists()


def test_demo_compares_rules_and_scales(model, output, capsys):
    assert main(["demo", "--model", str(model), "--steps", "2", "--device", "cpu", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    rows = [line.split()[:2] for line in printed.splitlines()[1:7]]
    assert rows == [[rule, scale] for rule in ("cfg", "apg") for scale in ("3", "7", "15")]
    assert str(output / "demo.png") in printed
    with Image.open(output / "demo.png") as image:
        assert image.width > 6 * 16


def test_info_and_version(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"torch            {torch.__version__}" in printed
    assert "cfg, " in printed
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trimtab {trimtab.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["paint"], ["info", "--loud"]])
def test_unusable_command_lines(argv, capsys):
    _assert_one_line(main(argv), "", capsys)


def test_help_and_mistakes_do_not_wait_for_torch():
    code = "import sys; from trimtab.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    for argv in (["generate", "--help"], ["generate"], ["generate", "a", "--steps", "x"]):
        subprocess.run([sys.executable, "-c", code, *argv], check=True, capture_output=True)


def test_the_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "trimtab", "generate"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("trimtab: error: ") and run.stderr.count("\n") == 1


def test_slug():
    assert slug("A cat, to the left: of an owl!") == "a-cat-to-the-left-of-an-owl"
    assert slug("кот на фоне") == "кот-на-фоне"
    assert slug("../..") == "picture"
    assert len(slug("word " * 50)) <= 48
    with contextlib.suppress(OSError):
        assert os.sep not in slug(f"a{os.sep}b")
