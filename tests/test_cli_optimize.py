"""``trimtab optimize`` on a tiny model and the bundled reward."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.cli import main
from trimtab.commands import optimize as optimize_command
from trimtab.commands.optimize_report import curve

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    tiny_pipeline("sd3").save_pretrained(folder)
    return folder


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "made" / "here"


def optimize(model, output, *options: str) -> int:
    quick = ["--steps", "2", "--guidance-scale", "4", "--num-optimization-steps", "4", "--device", "cpu"]
    return main(["optimize", *quick, "--model", str(model), "--output", str(output), *options])


def test_files_say_what_was_made_and_how(model, output, capsys):
    code = optimize(model, output, "--seed", "5", "--num-images", "2", "--monitor", "bundled", "--", "a cat")
    assert code == 0
    names = [f"0000-a-cat-seed{seed}" for seed in (5, 6)]
    endings = (".png", "-strip.png", "-rewards.png", ".json")
    files = [name + end for name in names for end in endings]
    assert sorted(p.name for p in output.iterdir()) == sorted([*files, "manifest.jsonl"])
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(names, lines, strict=True):
        content = json.loads((output / f"{name}.json").read_text())
        rewards = content["rewards"]
        assert len(rewards) == 4 and content["best_reward"] == max(rewards) == rewards[content["best_step"]]
        assert content["initial_reward"] == rewards[0] < content["best_reward"]
        assert content["terms"] == {"bundled": rewards} and content["monitor"] == rewards
        assert content["evaluations"] == 4 and not content["interrupted"] and content["stopped"] is None
        assert line.startswith(str(output / f"{name}-strip.png")) and f"at iteration {content['best_step']}" in line
        with Image.open(output / f"{name}.png") as image:
            assert image.size == (16, 16) and image.text["prompt"] == "a cat"
            assert json.loads(image.text["settings"]) == content["job"]
        with Image.open(output / f"{name}-rewards.png") as image:
            assert image.size == (480, 480)  # the reward's panel and the held-out one's
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert optimize(model, output, "--seed", "5", "--num-images", "2", "--monitor", "bundled", "--", "a cat") == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert "2 of 2 pictures are in" in capsys.readouterr().err
    assert optimize(model, output, "--seed", "5", "--optimizer", "best-of-n", "--", "a cat") == 0  # other settings
    assert json.loads((output / f"{names[0]}.json").read_text())["job"]["optimizer"] == "best-of-n"


def test_many_from_a_file_alone_or_at_once(model, tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    lines = [
        {"prompt": "a cat", "seed": 3},
        {"prompt": "a dog", "negative_prompt": "bad quality"},
        {"prompt": "a fox", "reward_prompt": "an owl on a sky background"},
    ]
    jobs.write_text("\n\n".join(json.dumps(line) for line in lines))
    folders = []
    for size in ("1", "2"):
        folders.append(tmp_path / size)
        assert optimize(model, folders[-1], "--input", str(jobs), "--batch-size", size) == 0
    names = sorted(path.name for path in folders[0].glob("*.json"))
    assert names == ["0000-a-cat-seed3.json", "0001-a-dog-seed0.json", "0002-a-fox-seed0.json"]
    for name in names:
        alone, together = (json.loads((folder / name).read_text()) for folder in folders)
        assert np.allclose(alone["rewards"], together["rewards"], rtol=0, atol=1e-3)
        assert alone["job"] == together["job"]


@pytest.mark.parametrize("weighting", ["sum", "worst-case"])
def test_weights_of_several_rewards(weighting, model, output, tmp_path):
    folder = str(tmp_path / "copy")
    from trimtab.assets import asset_path
    from trimtab.rewards import CLIPReward

    reward = CLIPReward.from_pretrained(str(asset_path("emoji-clip")))
    reward.model.save_pretrained(folder)
    reward.tokenize.tokenizer.save_pretrained(folder)
    shutil.copy(asset_path("emoji-clip") / "preprocessor_config.json", folder)
    weights = ["--reward", "bundled=2", "--reward", f"{folder}=0.5", "--weighting", weighting]
    assert optimize(model, output, *weights, "--", "a cat") == 0
    (path,) = output.glob("*.json")
    content = json.loads(path.read_text())
    assert content["job"]["reward"] == {"bundled": 2.0, folder: 0.5} and content["job"]["weighting"] == weighting
    terms = np.array([content["terms"]["bundled"], content["terms"]["clip"]])
    expected = 2 * terms[0] + 0.5 * terms[1]
    if weighting == "worst-case":  # of the gains over the start
        expected = np.minimum(2 * (terms[0] - terms[0][0]), 0.5 * (terms[1] - terms[1][0]))
    assert np.allclose(expected, content["rewards"], rtol=0, atol=1e-4)


def test_an_interrupt_keeps_the_best_so_far(model, output, capsys, monkeypatch):
    from trimtab.rewards import CLIPReward

    score, calls = CLIPReward.score, []

    def third_is_interrupted(self, images, prompts):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, images, prompts)

    monkeypatch.setattr(CLIPReward, "score", third_is_interrupted)
    assert optimize(model, output, "--", "a cat", "a dog") == 130
    assert "interrupted; what was finished is kept" in capsys.readouterr().err
    (path,) = output.glob("*.json")
    content = json.loads(path.read_text())
    assert content["interrupted"] and len(content["rewards"]) == 2
    assert optimize(model, output, "--", "a cat", "a dog") == 0  # one that was cut short is made again
    assert not json.loads(path.read_text())["interrupted"] and len(list(output.glob("*.json"))) == 2


def test_a_reward_that_ends_is_said(model, output, capsys, monkeypatch):
    from trimtab.rewards import CLIPReward

    score, calls = CLIPReward.score, []

    def third_is_nan(self, images, prompts):
        calls.append(1)
        return score(self, images, prompts) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(CLIPReward, "score", third_is_nan)
    assert optimize(model, output, "--", "a cat") == 0
    assert "(the reward at iteration 2 is not finite)" in capsys.readouterr().out
    (path,) = output.glob("*.json")
    assert json.loads(path.read_text())["rewards"][2] is None


BAD = {
    "no prompt": ([], "at least one PROMPT"),
    "blank prompt": (["--", " "], "a prompt must have a word in it"),
    "no file": (["--input", "/no/such/file"], "--input takes a JSONL file; /no/such/file"),
    "unknown reward": (["--reward", "hps", "--", "a cat"], "--reward: `source` is 'hps'; takes bundled"),
    "unknown monitor": (["--monitor", "hps", "--", "a cat"], "--monitor: `source` is 'hps'"),
    "not converted": (["--reward", "hpsv2.1", "--", "a cat"], "published as a pickle"),
    "weight no number": (["--reward", "bundled=much", "--", "a cat"], "got 'bundled=much'"),
    "weights of nothing": (["--reward", "bundled=0", "--", "a cat"], "takes at least one > 0"),
    "reward twice": (["--reward", "bundled=1", "--reward", "bundled=2", "--", "a cat"], "bundled twice"),
    "worst of one": (["--weighting", "worst-case", "--", "a cat"], "--weighting worst-case takes two or more"),
    "unknown weighting": (["--weighting", "mean", "--", "a cat"], "invalid choice: 'mean'"),
    "unknown optimizer": (["--optimizer", "newton", "--", "a cat"], "`optimizer` is 'newton'"),
    "unknown gradient": (["--gradient", "half", "--", "a cat"], "`gradient` is 'half'"),
    "unknown preset": (["--preset", "papers", "--", "a cat"], "`preset` is 'papers'"),
    "no learning rate": (["--learning-rate", "0", "--", "a cat"], "--learning-rate takes a number above 0; got 0"),
    "patience alone": (["--monitor-patience", "3", "--", "a cat"], "without a `monitor`"),
    "no iterations": (["--num-optimization-steps", "0", "--", "a cat"], "1 or more; got 0"),
    "odd height": (["--height", "30", "--", "a cat"], "--height takes a multiple of 4"),
    "no model": (["--model", "/no/such/folder", "--", "a cat"], "/no/such/folder does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_written(name, model, output, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRIMTAB_REWARDS", str(tmp_path / "none"))
    options, words = BAD[name]
    _assert_one_line(optimize(model, output, *options), words, capsys)
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{]", "line 2: no JSON"),
        ("[]", "line 2: takes an object with prompt; got []"),
        ('{"seed": 1}', "line 2: lacks prompt"),
        ('{"prompt": "a cat", "sed": 1}', "knows no sed; takes prompt, negative_prompt, seed"),
        ('{"prompt": "a cat", "seed": -1}', '"seed" takes a whole number, 0 to 2**63 - 1; got -1'),
        ('{"prompt": 3}', '"prompt" takes a text; got 3'),
    ],
)
def test_lines_that_are_no_job(line, words, model, output, tmp_path, capsys):
    file = tmp_path / "jobs.jsonl"
    file.write_text(f"\n{line}\n")
    _assert_one_line(optimize(model, output, "--input", str(file)), words, capsys)
    file.write_text("\n")
    _assert_one_line(optimize(model, output, "--input", str(file)), "a job a line", capsys)
    assert not output.parent.exists()


def _assert_one_line(code: int, words: str, capsys) -> None:
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("trimtab: error: ") and captured.err.count("\n") == 1
    assert words in captured.err


def test_curves_are_drawn_where_their_numbers_are():
    """A reward that rises at the end: its line is black there, and nowhere near the top before."""
    pixels = np.asarray(curve([0.0] * 9 + [1.0])).astype(int)
    black = (pixels.sum(2) < 100) & (np.arange(pixels.shape[1]) > 70)[None]
    assert black[26:32, 440:].any() and not black[26:150, 100:380].any()
    single = curve([float("nan"), 0.5], monitor=[1.0, 2.0])
    assert single.size == (480, 480)
    torch.testing.assert_close(np.asarray(curve([1.0, 1.0])).shape, (240, 480, 3))


@pytest.mark.parametrize("preset", [None, "default", "paper", "sphere", "mine.json", "flux-schnell"])
def test_the_bundled_model_takes_four_steps_unless_a_preset_says_how_to_call_it(preset):
    job = {"model": "bundled", "steps": None, "guidance_scale": None, "height": None, "width": None}
    job |= {**dict.fromkeys(optimize_command.OF_THE_RUN), "preset": preset, "learning_rate": None}
    own = preset == "flux-schnell"
    assert optimize_command._few_steps(job) is not own
    call = optimize_command._call(tiny_pipeline("sd3"), job)
    assert ("sigmas" in call) is not own and ("num_inference_steps" in call) is not own
    if not own:
        asked = optimize_command._call(tiny_pipeline("sd3"), {**job, "steps": 6})
        assert (asked["num_inference_steps"], asked["guidance_scale"]) == (6, 5.0) and "sigmas" not in asked
