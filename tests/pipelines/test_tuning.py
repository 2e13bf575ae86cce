"""Settings tuned by consensus hopping, and the presets that pipelines load."""

import json
import math

import pytest
import torch

from tests.tiny_pipelines import tiny_pipeline
from trimtab.cli import main
from trimtab.guidance import AdaptiveProjectedGuidance, TunedPreset, make_guider
from trimtab.pipelines import NoiseOptimizationPipeline
from trimtab.pipelines.noise_presets import noise_preset
from trimtab.pipelines.tuning import GUIDANCE_KNOBS, Knob, guidance_judgement, noise_judgement, tune
from trimtab.rewards import CallableReward

RED = CallableReward(lambda images, prompts: images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3)), True)


def bowl(settings):
    """Best at scale 4, momentum 0.1 and threshold 0.2."""
    off = (
        math.log(settings["guidance_scale"] / 4),
        settings["momentum"] - 0.1,
        math.log(settings["rescale_rms"] / 0.2),
    )
    return -sum(value**2 for value in off)


def test_the_best_settings_are_found_and_never_worse_than_the_default():
    found = tune(bowl, GUIDANCE_KNOBS, evaluations=96)
    assert found.default_value == pytest.approx(bowl({name: knob.default for name, knob in GUIDANCE_KNOBS.items()}))
    assert found.value > 0.1 * found.default_value and len(found.history) == 96
    assert found.value == max(value for _, value in found.history) == bowl(found.settings)
    flat = tune(lambda s: float(s["guidance_scale"] == pytest.approx(10.0)), GUIDANCE_KNOBS, evaluations=10)
    assert flat.settings == pytest.approx({name: knob.default for name, knob in GUIDANCE_KNOBS.items()})


def test_codes_and_values_are_each_others_inverse_and_bounded():
    for knob in (Knob(1.5, 20.0, 10.0, log=True), Knob(-0.9, 0.5, -0.5)):
        for code in (0.0, 0.3, 1.0):
            assert knob.code(knob.value(code)) == pytest.approx(code)
        assert knob.value(-1.0) == knob.low and knob.value(2.0) == pytest.approx(knob.high)
    assert Knob(1.0, 100.0, 10.0, log=True).code(10.0) == pytest.approx(0.5)


def test_an_interrupted_run_goes_on_where_it_was():
    whole = tune(bowl, GUIDANCE_KNOBS, evaluations=30, seed=3)
    judged, values = [], [value for _, value in whole.history[:13]]
    again = tune(
        bowl, GUIDANCE_KNOBS, evaluations=30, seed=3, known=values, on_evaluation=lambda s, v: judged.append(v)
    )
    assert again == whole and len(judged) == 17


def test_a_judgement_that_is_not_finite_is_the_worst():
    found = tune(lambda s: math.nan if s["x"] > 0.5 else s["x"], {"x": Knob(0.0, 1.0, 0.2)}, evaluations=40)
    assert 0.3 < found.value <= 0.5
    with pytest.raises(FloatingPointError, match="whole hop"):
        tune(lambda s: math.nan, {"x": Knob(0.0, 1.0, 0.2)}, evaluations=8)


def test_guidance_is_judged_with_the_same_noise_each_time():
    pipe = tiny_pipeline("sd3")
    pipe.set_progress_bar_config(disable=True)
    judged = guidance_judgement(pipe, ["a cat", "a dog", "an owl"], RED, batch_size=2, num_inference_steps=2)
    settings = {"guidance_scale": 6.0, "momentum": -0.5, "rescale_rms": 0.5}
    first = judged(settings)
    assert first == judged(settings) != judged(settings | {"guidance_scale": 2.0})
    from trimtab.guidance import attach

    guider = AdaptiveProjectedGuidance(6.0, -0.5, adaptive_projected_guidance_rescale_rms=0.5)
    values = []
    for i, text in enumerate(["a cat", "a dog", "an owl"]):
        with attach(pipe, guider):
            generator = torch.Generator().manual_seed(i)
            options = {"num_inference_steps": 2, "generator": generator, "output_type": "pt", "guidance_scale": 6.0}
            values.append(RED(pipe(text, **options).images, text).item())
    assert first == pytest.approx(sum(values) / 3, abs=1e-5)


def test_noise_is_judged_at_its_step():
    pipe = NoiseOptimizationPipeline.from_pipe(tiny_pipeline("sd3"), reward=RED)
    pipe.set_progress_bar_config(disable=True)
    judged = noise_judgement(pipe, ["a cat"], RED, num_inference_steps=1, num_optimization_steps=3)
    small, large = judged({"lr": 0.001}), judged({"lr": 0.1})
    assert small < large
    call = {"num_inference_steps": 1, "num_optimization_steps": 3, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    made = pipe("a cat", preset="sphere", optimizer_kwargs={"lr": 0.1}, generator=generator, **call).images
    assert large == pytest.approx(RED(made, "a cat").item(), abs=1e-5)  # what a tuned file's step is over


def test_presets_are_files_that_pipelines_and_guiders_load(tmp_path):
    path = tmp_path / "mine.json"
    preset = TunedPreset({"guidance_scale": 6.0, "momentum": 0.25, "rescale_rms": 0.1}, {"lr": 0.2}, {"judge": "x"})
    preset.save(path)
    assert TunedPreset.load(path) == preset and [p.name for p in tmp_path.iterdir()] == ["mine.json"]
    for guider in (AdaptiveProjectedGuidance.from_preset(str(path)), make_guider(str(path), 6.0)):
        assert (guider.guidance_scale, guider.momentum, guider.rescale_rms, guider.rescale) == (6.0, 0.25, 0.1, None)
    assert AdaptiveProjectedGuidance.from_preset(str(path), guidance_scale=3.0).guidance_scale == 3.0
    assert noise_preset(str(path)).optimizer["lr"] == 0.2 and noise_preset(None).optimizer["lr"] == 5.0
    for content, message in (
        ("[1", "no JSON"),
        ("{}", "no preset"),
        ('{"format": "trimtab preset 1", "guidance": {"scale": 1}}', "takes settings among"),
        ('{"format": "trimtab preset 1", "noise": {"lr": "fast"}}', "takes a finite number"),
        ('{"format": "trimtab preset 1", "noise": {"lr": NaN}}', "takes a finite number"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            TunedPreset.load(path)
    with pytest.raises(FileNotFoundError):
        AdaptiveProjectedGuidance.from_preset(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="or a .json file"):
        AdaptiveProjectedGuidance.from_preset("nothing")


def test_bad_input_is_named():
    for options, message in (({"evaluations": 1}, "`evaluations`"), ({"num_particles": 1}, "`num_particles`")):
        with pytest.raises(ValueError, match=message):
            tune(bowl, GUIDANCE_KNOBS, **options)
    with pytest.raises(ValueError, match="`knobs`"):
        tune(bowl, {})
    for arguments in ((1.0, 0.0, 0.5), (0.0, 1.0, 2.0), (0.0, 1.0, 0.5, True)):
        with pytest.raises(ValueError, match="a knob from"):
            Knob(*arguments)


def test_the_command_writes_a_preset_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held.txt").write_text("an owl on a pink background\n")
    command = ["tune", "a cat on a sky background", "--evaluations", "3", "--particles", "2", "--steps", "2",
               "--held-out-file", "held.txt", "--judge", "right-share", "--output", "p.json"]  # fmt: skip
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "3 of 3" in text and "on 1 held-out prompts" in text
    content = json.loads((tmp_path / "p.json").read_text())
    assert set(content["guidance"]) == {"guidance_scale", "momentum", "rescale_rms"}
    assert content["tuned"]["value"] >= content["tuned"]["default_value"]
    log = json.loads((tmp_path / "p.log.json").read_text())
    (tmp_path / "p.json").unlink()
    (tmp_path / "p.log.json").write_text(json.dumps({**log, "values": log["values"][:2]}))
    assert main(command) == 0
    again = capsys.readouterr()
    assert "2 settings were judged before" in again.err and "1 of 3" not in again.out and "3 of 3" in again.out
    assert json.loads((tmp_path / "p.json").read_text()) == content
    generate = ["generate", "a cat on a sky background", "--guidance", "p.json", "--steps", "2", "--output", "out"]
    assert main(generate) == 0
    assert len(list((tmp_path / "out").glob("*-p-*.png"))) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--output", "preset.txt"], "ends in .json"),
        (["--output", "nowhere/p.json"], "is no folder"),
        (["--evaluations", "1"], "take 2 or more"),
        (["--judge", "beauty"], "--judge"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "a cat", *options]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
