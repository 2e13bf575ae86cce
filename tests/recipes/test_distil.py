"""The distillation recipe: its target against closed forms, its states against the stock pipeline, a run end to end."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file

from tests.recipes.small_model import save_small_model
from trimtab.assets import asset_path
from trimtab.recipes import distil as recipe
from trimtab.recipes.distil import Distillation, StraightStep, distil, load_teacher, main, teacher_end
from trimtab.recipes.emoji_scenes import CATEGORIES, check_scene, sample_facts, write_caption
from trimtab.recipes.training_loop import TrainingSettings

CAPTION = "a cat to the left of an owl on a sky background"
SETTINGS = Distillation(TrainingSettings(4, 8, 1e-3, warmup_steps=0))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model"), latent_mean=0.0, latent_deviation=1.0)


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_end_under_constant_velocities_is_a_straight_line(w):
    generator = torch.Generator().manual_seed(0)
    x, u, c = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    end = teacher_end(lambda z, s: (u, c), x, torch.ones(2), 0.25, num_steps=5, guidance_scale=w)
    assert torch.allclose(end, x - 0.25 * (u + w * (c - u)).float(), atol=1e-6)


def test_end_is_eulers_at_the_levels_on_the_way():
    levels = []

    def velocity(z, sigma):
        levels.append(sigma.tolist())
        return z, 2 * z

    end = teacher_end(
        velocity, torch.ones(2, 1), torch.tensor([1.0, 0.5]), 0.25, num_steps=2, guidance_scale=1.5
    )  # the guided velocity is 2.5 z
    assert torch.allclose(end, torch.full((2, 1), (1 - 2.5 / 8) ** 2))
    assert levels == [[1.0, 0.5], [0.875, 0.375]]


def test_states_are_those_of_a_stock_call(model):
    pipe = StableDiffusion3Pipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return tensors

    levels = [1.0, 0.75, 0.5, 0.25]
    call = {"sigmas": levels, "guidance_scale": 1.0, "max_sequence_length": 16, "output_type": "latent"}
    final = pipe(CAPTION, latents=noise.clone(), callback_on_step_end=keep, **call).images
    teacher = load_teacher(model)
    ids = pipe.tokenizer([CAPTION], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        texts = recipe._texts(teacher, ids)
        student = StraightStep(teacher.transformer)
        states = recipe._visited(student, noise, torch.tensor(levels), list(texts))
        assert torch.allclose(states[1:], torch.cat(seen[:3]), atol=1e-4)
        last = states[-1:] - student(states[-1:], torch.tensor([0.25]), *texts) / 4
    assert torch.allclose(last, final, atol=1e-4)
    assert not torch.allclose(states[1], states[2], atol=1e-2)


def test_a_teacher_of_one_unguided_step_has_nothing_to_teach(model, tmp_path):
    settings = dataclasses.replace(SETTINGS, teacher_steps=1, guidance_scale=1.0)
    settings = dataclasses.replace(settings, training=TrainingSettings(50, 8, 0.0, warmup_steps=0))
    done, student = distil(load_teacher(model), settings, tmp_path)
    assert done
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    guided = dataclasses.replace(settings, guidance_scale=3.0)
    distil(load_teacher(model), guided, tmp_path / "guided")
    other = json.loads((tmp_path / "guided" / "log.jsonl").read_text().splitlines()[-1])
    assert row["loss"] < 1e-2 * other["loss"]
    for name, value in load_teacher(model).transformer.state_dict().items():
        assert torch.equal(student.state_dict()[name], value)


def test_it_learns_and_goes_on_after_an_interruption(model, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, training=TrainingSettings(150, 16, 3e-3, warmup_steps=5))
    monkeypatch.setitem(recipe.PRESETS, "cpu", settings)
    arguments = ["--preset", "cpu", "--folder", str(tmp_path / "run"), "--model", str(model), "--output", str(tmp_path)]
    main([*arguments, "--max-seconds", "0"])
    assert not (tmp_path / recipe.SUBFOLDER).exists()
    main(arguments)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and losses[-1] < 0.7 * losses[0]
    assert str(model) not in (tmp_path / recipe.SUBFOLDER / "config.json").read_text()
    student = SD3Transformer2DModel.from_pretrained(tmp_path / recipe.SUBFOLDER)
    pipe = StableDiffusion3Pipeline.from_pretrained(model, transformer=student)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(CAPTION, sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=1.0, max_sequence_length=16).images[0]
    assert np.asarray(image).std() > 0


@pytest.mark.parametrize("optimizer", ["frugal", "dct_adamw", "lanton", "nadam"])
def test_any_optimizer_by_name_resumes(model, tmp_path, monkeypatch, optimizer):
    settings = dataclasses.replace(SETTINGS, training=TrainingSettings(3, 8, 3e-3, warmup_steps=1))
    monkeypatch.setitem(recipe.PRESETS, "cpu", settings)
    monkeypatch.setattr(recipe, "NUM_CAPTIONS", 64)

    def run(name, *more):
        folder = str(tmp_path / name)
        flags = ["--preset", "cpu", "--model", str(model), "--folder", folder, "--output", folder]
        main([*flags, "--optimizer", optimizer, "--learning-rate", "1e-4", *more])
        checkpoint = json.loads((tmp_path / name / "checkpoint.json").read_text())
        assert checkpoint["settings"]["learning_rate"] == 1e-4
        return checkpoint["step"], load_file(tmp_path / name / "checkpoint.safetensors")

    assert run("parts", "--max-seconds", "0")[0] == 1
    (_, parts), (step, whole) = run("parts"), run("whole")
    assert step == 3 and parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_what_a_checkpoint_has_can_be_written(model, tmp_path, monkeypatch):
    monkeypatch.setitem(recipe.PRESETS, "cpu", SETTINGS)
    arguments = ["--preset", "cpu", "--folder", str(tmp_path / "run"), "--model", str(model), "--output", str(tmp_path)]
    main([*arguments, "--max-seconds", "0"])
    main([*arguments, "--write"])
    assert (tmp_path / recipe.SUBFOLDER / "diffusion_pytorch_model.safetensors").is_file()


def test_the_bundled_student_needs_four_evaluations():
    folder = asset_path("emoji-scenes")
    student = SD3Transformer2DModel.from_pretrained(folder, subfolder=recipe.SUBFOLDER)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, transformer=student)
    pipe.set_progress_bar_config(disable=True)
    rng, count = np.random.default_rng(11), 40
    captions = [write_caption(sample_facts(rng, CATEGORIES[i % len(CATEGORIES)], held_out=True)) for i in range(count)]

    def right(levels, number=count):
        generator = [torch.Generator().manual_seed(i) for i in range(number)]
        call = {"guidance_scale": 1.0, "max_sequence_length": 16, "output_type": "pt"}
        images = pipe(captions[:number], sigmas=levels, generator=generator, **call).images
        return sum(verdict.correct for verdict in check_scene(images, captions[:number])) / number

    assert right([1.0, 0.75, 0.5, 0.25]) >= 0.6
