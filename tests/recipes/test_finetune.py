"""The finetuning recipe: what it writes loads into the stock pipeline; interrupted runs end as undisturbed ones."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image

from tests.recipes.small_model import save_small_model
from trimtab.assets import asset_path
from trimtab.recipes.captioned_pictures import encode_pictures, object_facts, read_pictures, write_object_scenes
from trimtab.recipes.emoji_scenes import OBJECTS, caption_words, check_scene, sample_scene
from trimtab.recipes.emoji_scenes.new_object import BELL, known_object
from trimtab.recipes.finetune import Finetuning, finetune, main, save_result
from trimtab.recipes.optimizers import OPTIMIZERS, build_optimizers
from trimtab.recipes.training_loop import TrainingSettings

TRAINING = TrainingSettings(
    6, 4, 1e-2, warmup_steps=0, mixed_precision="no", log_every=1, checkpoint_seconds=0.0, ema_decay=0.5
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model"), latent_mean=0.5, latent_deviation=2.0)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_object_scenes(BELL, tmp_path_factory.mktemp("scenes"), count=6)


def load(model):
    pipe = StableDiffusion3Pipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe):
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 2, "max_sequence_length": 16, "output_type": "latent"}
    return pipe("a bell on a pink background", generator=generator, **call).images


def run(model, scenes, folder, settings=None, **options):
    pipe = load(model)
    pictures = encode_pictures(pipe, *read_pictures(scenes))
    done = finetune(pipe, pictures, settings or Finetuning(TRAINING, rank=2), folder, **options)
    return done, pipe


def test_the_bell_is_new_and_the_judge_can_be_told_of_it(scenes):
    assert BELL.name not in OBJECTS and BELL.name not in caption_words()
    facts = object_facts(BELL, 50, 0)
    assert all(BELL.name in item.objects for item in facts) and facts == object_facts(BELL, 50, 0)
    assert {item.category for item in facts} == {"one", "count", "left_right", "above_below"}
    pictures, captions = read_pictures(scenes)
    with pytest.raises(ValueError, match="caption must name"):
        check_scene(pictures[0], captions[0])
    with known_object(BELL):
        assert all(verdict.correct for verdict in check_scene(pictures, captions))
        cat = sample_scene(np.random.default_rng(0), dataclasses.replace(facts[0], objects=("cat",))).to_image()
        assert not check_scene(cat, captions[0])[0].shown
        with pytest.raises(ValueError, match="'bell'"), known_object(BELL):
            pass
    assert BELL.name not in OBJECTS


def test_latents_and_texts_are_the_pipelines_own(model, scenes):
    pipe = load(model)
    images, captions = read_pictures(scenes)
    pictures = encode_pictures(pipe, images, captions)
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(images[1])
        latents = (pipe.vae.encode(pixels).latent_dist.mean - 0.5) / 2.0
        features, _, pooled, _ = pipe.encode_prompt(captions[1], None, None, max_sequence_length=16)
    torch.testing.assert_close(pictures.latents[1:2], latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pictures.features[1:2], features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pictures.pooled[1:2], pooled, rtol=1e-4, atol=1e-4)
    assert pictures.no_features.shape == features.shape and not torch.equal(pictures.no_pooled, pooled)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_result_loads_into_the_stock_pipeline(model, scenes, tmp_path, train):
    settings = Finetuning(TRAINING, train, rank=2)
    prompts = ["a bell on a pink background", "two bells on a sky background"]
    options = {"validation_prompts": prompts, "validate_every": 3}
    done, trained = run(model, scenes, tmp_path / "run", settings, **options)
    assert done
    names = sorted(path.name for path in (tmp_path / "run" / "validation").iterdir())
    assert names == ["000003.png", "000006.png"]
    with Image.open(tmp_path / "run" / "validation" / names[0]) as image:
        assert image.size == (256, 128)
    expected = drawn(trained)
    path = save_result(trained, train, tmp_path)
    stock = load(model)
    before = drawn(stock)
    if train == "lora":
        stock.load_lora_weights(path)
        assert len(list(path.iterdir())) == 1
        torch.testing.assert_close(drawn(stock), expected, rtol=1e-3, atol=1e-3)
    else:
        stock = load(model)
        stock.transformer = SD3Transformer2DModel.from_pretrained(path)
        torch.testing.assert_close(drawn(stock), expected, rtol=5e-2, atol=5e-2)  # written in bfloat16
    assert not torch.allclose(before, drawn(stock), atol=1e-2)


@pytest.mark.parametrize("optimizer", ["adamw", "frugal", "soap"])
def test_killed_and_resumed_equals_undisturbed(model, scenes, tmp_path, optimizer):
    train = "full" if optimizer == "frugal" else "lora"
    training = dataclasses.replace(TRAINING, accumulation=2, num_steps=4)
    settings = Finetuning(training, train, rank=2, optimizer=optimizer)
    _, whole = run(model, scenes, tmp_path / "whole", settings)
    for number in range(2):
        done, _ = run(model, scenes, tmp_path / "parts", settings, max_seconds=0.0)
        assert not done
        assert json.loads((tmp_path / "parts" / "checkpoint.json").read_text())["step"] == number + 1
    done, parts = run(model, scenes, tmp_path / "parts", settings)
    assert done
    for (name, expected), got in zip(whole.transformer.named_parameters(), parts.transformer.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, msg=name)


def test_accumulated_micro_batches_are_one_batch_and_a_growing_batch_sees_as_many_samples(model, scenes, tmp_path):
    accumulated = dataclasses.replace(TRAINING, num_steps=6, accumulation=2)
    done, _ = run(model, scenes, tmp_path / "fixed", Finetuning(accumulated, rank=2))
    rows = [json.loads(line) for line in (tmp_path / "fixed" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    growing = Finetuning(accumulated, rank=2, optimizer="adagrad_norm", max_batch_size=64)
    done, _ = run(model, scenes, tmp_path / "growing", growing)
    rows = [json.loads(line) for line in (tmp_path / "growing" / "log.jsonl").read_text().splitlines()]
    assert done and rows[0]["batch_size"] > 8 and rows[-1]["step"] < 6
    assert 48 <= rows[-1]["samples"] < 48 + 64


class Kept(GeneralTracker):
    name, requires_logging_directory = "kept", False

    def __init__(self):
        super().__init__()
        self.config, self.rows = None, []

    @property
    def tracker(self):
        return self.rows

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step, **kwargs):
        self.rows.append((step, values))


def test_trackers_get_the_log(model, scenes, tmp_path):
    tracker = Kept()
    run(model, scenes, tmp_path, Finetuning(dataclasses.replace(TRAINING, num_steps=2), rank=2), trackers=[tracker])
    assert tracker.config["learning_rate"] == 1e-2
    assert [step for step, _ in tracker.rows] == [1, 2] and tracker.rows[0][1]["loss"] > 0


@pytest.mark.parametrize("name", [*OPTIMIZERS, "SGD", "adafactor"])
def test_every_optimizer_by_name_takes_a_step(name):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 6))
    before = [p.detach().clone() for p in module.parameters()]
    optimizers = build_optimizers(name, module, TRAINING)
    module(torch.randn(5, 6)).square().mean().backward()
    for optimizer in optimizers * 2:  # SOAP's first step only fills its state
        optimizer.step()
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters())
    assert all(not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_bad_input_is_named(model, scenes, tmp_path):
    with pytest.raises(ValueError, match="`optimizer` is 'none'; takes .*adamw.*sgd"):
        build_optimizers("none", torch.nn.Linear(2, 2), TRAINING)
    with pytest.raises(ValueError, match="requires a gradient"):
        build_optimizers("adamw", torch.nn.Linear(2, 2).requires_grad_(False), TRAINING)
    with pytest.raises(ValueError, match="`train` is 'half'"):
        Finetuning(TRAINING, "half")
    with pytest.raises(ValueError, match="`rank` is 0"):
        Finetuning(TRAINING, rank=0)
    with pytest.raises(FileNotFoundError, match="no metadata.jsonl"):
        read_pictures(tmp_path)
    for line in ("{", '{"file_name": "a.png"}', '{"file_name": "../x.png", "text": "a"}', ""):
        (tmp_path / "metadata.jsonl").write_text(line)
        with pytest.raises(ValueError, match="metadata.jsonl"):
            read_pictures(tmp_path)


def test_the_command_line(model, tmp_path, capsys):
    arguments = ["--model", str(model), "--output", str(tmp_path), "--scenes", "3", "--steps", "2", "--batch-size", "2"]
    arguments += ["--rank", "2", "--mixed-precision", "no", "--train", "lora", "--optimizer", "sgd"]
    main([*arguments, "--max-seconds", "0"])
    assert "run the same command" in capsys.readouterr().out and not (tmp_path / "lora").exists()
    main(arguments)
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert len(list((tmp_path / "scenes").glob("*.png"))) == 3


@pytest.mark.slow
def test_two_processes_train_together(model, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "trimtab.recipes.finetune"]
    arguments = ["--model", str(model), "--output", str(tmp_path), "--scenes", "3", "--steps", "3", "--batch-size", "2"]
    arguments += ["--rank", "2", "--mixed-precision", "no", "--log-every", "1", "--max-batch-size", "32"]
    write_object_scenes(BELL, tmp_path / "scenes", count=3)
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 1 and rows[0]["samples"] == 4  # one micro-batch of two in each of two processes
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_the_bundled_sprites_hold_the_bell():
    assert (asset_path("emoji-sprites") / BELL.sprite).is_file()
