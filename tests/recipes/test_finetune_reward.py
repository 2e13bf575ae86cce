"""Finetuning on a reward without a gradient: exact log-densities, every estimator, runs that resume, two processes."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from tests.recipes.small_model import save_small_model
from trimtab.optim import gaussian_log_prob
from trimtab.recipes.checkpoints import trained_parameters
from trimtab.recipes.denoising_policy import DenoisingPolicy, GuidedVelocity, encode_captions
from trimtab.recipes.emoji_scenes import parse_caption, sample_scene
from trimtab.recipes.finetune_reward import (
    RewardFinetuning,
    finetune_reward,
    load_pipeline,
    load_result,
    main,
    scene_reward,
    training_captions,
)
from trimtab.recipes.policy_update import PolicyUpdate
from trimtab.recipes.reward_rollouts import ESTIMATORS, Estimator
from trimtab.recipes.training_loop import TrainingSettings

TRAINING = TrainingSettings(
    3, 4, 1e-2, warmup_steps=0, mixed_precision="no", log_every=1, checkpoint_seconds=0.0, ema_decay=0.5
)
CAPTIONS = ["two cats on a pink background", "three owls on a sky background", "two foxes on a mint background"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model"), latent_mean=0.5, latent_deviation=2.0)


@pytest.fixture(scope="module")
def loaded(model):
    return load_pipeline(model, "transformer")


@pytest.fixture
def pipe(loaded):
    return copy.deepcopy(loaded)


def brightness(pictures, captions):
    """A reward; the brighter half of a draw are the successes."""
    rewards = pictures.mean((1, 2, 3))
    return rewards, rewards > rewards.median()


def red(pictures, captions):
    return 100 * (pictures[:, 0] - pictures[:, 1]).mean((1, 2)), torch.zeros(len(pictures))


def run(loaded, folder, name, reward=brightness, training=TRAINING, **options):
    pipe = copy.deepcopy(loaded)
    estimator = Estimator(name, 2, demo_draws=2, passes=2 if name in ("ppo", "grpo") else 1)
    done = finetune_reward(pipe, CAPTIONS, reward, RewardFinetuning(training, estimator, rank=2), folder, **options)
    return done, trained_parameters(pipe.transformer)


def update_of(pipe, reward=brightness, estimator=None, guidance=1.0, **options):
    module = GuidedVelocity(pipe.transformer, encode_captions(pipe, [""]), guidance)
    policy = DenoisingPolicy(pipe, (1.0, 0.6, 0.3), noise_level=0.8, **options)
    texts = encode_captions(pipe, CAPTIONS)
    return PolicyUpdate(policy, module, texts, reward, estimator or Estimator(group_size=2), prompts=2)


@pytest.mark.parametrize("options", [{}, {"guidance": 3.0}, {"transition": "sde"}, {"learnt": 1}])
def test_log_densities_are_those_of_the_draws(pipe, options):
    """Of the states that the scheduler drew, by the Gaussian's own formula; pictures as the stock pipeline has them."""
    update = update_of(pipe, **options)
    batch = update.roll_out(0, torch.device("cpu"))
    taken = {"sde": 3, "ddim": 2}[options.get("transition", "ddim")] if "learnt" not in options else 1
    assert batch.chains.states.shape == (4, taken + 1, 8, 16, 16)
    with torch.no_grad():
        found = update.policy.log_probs(update.module, batch.chains, reduce="sum")
        for k in range(taken):
            before, after = batch.chains.states[:, k], batch.chains.states[:, k + 1]
            sigma, texts = torch.full((4,), (1.0, 0.6, 0.3)[k]), batch.chains.texts
            velocity = update.module(before, sigma, texts.features, texts.pooled)
            mean, std = update.policy.scheduler.transition(velocity, update.policy.scheduler.timesteps[k], before)
            torch.testing.assert_close(found[:, k], gaussian_log_prob(after, mean, std), rtol=1e-4, atol=0.5)
            assert 0.8 < float(((after - mean) / std).std()) < 1.2  # they are draws of that Gaussian


def test_without_noise_the_sampler_is_the_stock_pipeline_s(pipe):
    policy = DenoisingPolicy(pipe, (1.0, 0.5), noise_level=1e-4)
    noise = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    chains = policy.draw(
        GuidedVelocity(pipe.transformer), encode_captions(pipe, CAPTIONS[:2]), noise, torch.Generator().manual_seed(0)
    )
    call = {"sigmas": [1.0, 0.5], "guidance_scale": 1.0, "max_sequence_length": 16, "output_type": "pt"}
    expected = pipe(CAPTIONS[:2], latents=noise, **call).images
    torch.testing.assert_close(policy.pictures(chains.latents), expected, rtol=0, atol=1e-2)


def test_a_group_shares_prompt_and_noise_and_demonstrations_are_its_best(pipe):
    seen = {}

    def judge(pictures, captions):
        seen.setdefault("captions", list(captions))
        rewards = pictures.mean((1, 2, 3))
        return rewards, torch.zeros(len(rewards)) if len(seen) == 1 and not seen.get("again") else rewards > 0

    update = update_of(pipe, judge, Estimator("hybrid", 2, demo_draws=3))
    batch = update.roll_out(0, torch.device("cpu"))
    captions = batch.chains.texts.captions
    assert captions[0] == captions[1] and captions[2] == captions[3]
    states = batch.chains.states
    assert torch.equal(states[0, 0], states[1, 0]) and not torch.equal(states[0, 1], states[1, 1])
    assert batch.drawn == 4 + 2 * 3 and batch.demos is None  # all failed, also of the further draws
    seen["again"] = True
    other = update_of(pipe, judge, Estimator("hybrid", 2, gate=1.0, demo_draws=3))
    batch = other.roll_out(0, torch.device("cpu"))
    best = batch.rewards.view(2, 2).argmax(1) + torch.tensor([0, 2])
    assert batch.drawn == 4 and torch.equal(batch.demos.states, batch.chains.states[best])
    with torch.no_grad():
        loss, share = other._hybrid_loss(other.module, batch)
        nll = -other.policy.log_probs(other.module, batch.demos, reduce="mean").mean()
    assert share == 1.0 and float(loss) == pytest.approx(float(nll), rel=1e-5)


@pytest.mark.parametrize("name", ["reinforce", "grpo"])
def test_gradient_is_the_score_function_s(pipe, name):
    """The loss's gradient against the definition: advantages times gradients of one chain at a time."""
    update = update_of(pipe, red, Estimator(name, 2))
    pipe.transformer.requires_grad_(False)
    weight = pipe.transformer.proj_out.weight.requires_grad_()
    batch = update.roll_out(0, torch.device("cpu"))
    (found,) = torch.autograd.grad(update.loss(update.module, batch)[0], weight)
    expected = torch.zeros_like(weight)
    groups = batch.rewards.view(2, 2)
    for row in range(4):
        one = batch.chains.rows(torch.tensor([row]))
        (score,) = torch.autograd.grad(update.policy.log_probs(update.module, one, reduce="sum").sum(), weight)
        group = groups[row // 2]
        centred = batch.rewards[row] - group.mean()
        advantage = 2 * centred if name == "reinforce" else centred / (group.std() + 1e-6)
        expected -= advantage * score / (4 * 2 * 2048)  # per coordinate and transition
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in ("reinforce", "ppo", "hybrid", "harpg"))) for n in ESTIMATORS],
)
def test_killed_and_resumed_equals_undisturbed(loaded, tmp_path, name):
    done, whole = run(loaded, tmp_path / "whole", name)
    assert done and any(float(p.detach().abs().max()) > 0 for n, p in whole.items() if "lora_B" in n)
    assert not run(loaded, tmp_path / "parts", name, max_seconds=0.0)[0]
    done, parts = run(loaded, tmp_path / "parts", name)
    assert done
    for key, expected in whole.items():
        torch.testing.assert_close(parts[key], expected, rtol=0, atol=0, msg=key)
    logs = [
        [json.loads(line) for line in (tmp_path / part / "log.jsonl").read_text().splitlines()]
        for part in ("whole", "parts")
    ]
    assert [row["reward"] for row in logs[0]] == [row["reward"] for row in logs[1]]
    drawn = [row["drawn"] for row in logs[0]]
    if name in ("harpg", "n_harpg"):
        assert drawn == [4, 8, 8]
    else:
        assert all(4 <= count <= 8 for count in drawn)


def test_the_reward_rises_and_the_result_loads(loaded, pipe, tmp_path):
    """Pictures become redder by a reward that has no gradient."""
    training = TrainingSettings(
        20, 8, 2e-2, warmup_steps=0, mixed_precision="no", log_every=1, checkpoint_seconds=1e9, ema_decay=0.0
    )
    settings = RewardFinetuning(training, Estimator("grpo", 8), rank=2, sigmas=(1.0, 0.5), noise_level=1.0)
    assert finetune_reward(pipe, CAPTIONS[:1], red, settings, tmp_path)
    rewards = [json.loads(line)["reward"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.5, rewards
    other = copy.deepcopy(loaded)
    assert load_result(other, tmp_path) == 20
    for (key, expected), got in zip(
        trained_parameters(pipe.transformer).items(), trained_parameters(other.transformer).values(), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, msg=key)


def test_scene_rewards_are_the_judge_s():
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, parse_caption(CAPTIONS[0]))
    picture = torch.from_numpy(scene.render()).permute(2, 0, 1)[None].float()
    for kind, wrong in (("correct", 0.0), ("right_share", 0.6)):
        rewards, successes = scene_reward(kind)(picture.expand(2, -1, -1, -1), [CAPTIONS[0], CAPTIONS[1]])
        assert successes.tolist() == [1, 0] and rewards[0] == 1 and float(rewards[1]) <= wrong
    captions = training_captions(["count", "one"], 50)
    facts = [parse_caption(caption) for caption in captions]
    assert len(set(captions)) == 50 and not any(item.is_held_out() for item in facts)
    assert {item.category for item in facts} == {"count", "one"}


def test_bad_input_is_named(pipe, tmp_path):
    for options in ({"name": "dpo"}, {"group_size": 1}, {"passes": 0}, {"gate": 1.5}, {"demo_draws": -1}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` is"):
            Estimator(**options)
    with pytest.raises(ValueError, match="`passes` is 2"):
        Estimator("npg_igt", passes=2)
    for name, value in (("rank", 0), ("noise_level", 0.0), ("learnt", 0)):
        with pytest.raises(ValueError, match=f"`{name}` is 0"):
            RewardFinetuning(TRAINING, Estimator(group_size=2), **{name: value})
    with pytest.raises(ValueError, match="`batch_size` is 4; takes a multiple of the group's 8"):
        RewardFinetuning(TRAINING)
    with pytest.raises(ValueError, match="`kind` is 'pretty'"):
        scene_reward("pretty")
    with pytest.raises(ValueError, match="`captions` is empty"):
        finetune_reward(pipe, [], brightness, RewardFinetuning(TRAINING, Estimator(group_size=2)), tmp_path)


ARGUMENTS = [
    "--transformer",
    "transformer",
    "--captions",
    "4",
    "--steps",
    "2",
    "--batch-size",
    "4",
    "--group-size",
    "2",
]
ARGUMENTS += ["--rank", "2", "--reward", "right_share", "--sigmas", "1", "0.5", "--learnt", "1"]


def test_the_command_line(model, tmp_path, capsys):
    arguments = ["--model", str(model), "--output", str(tmp_path), *ARGUMENTS]
    main([*arguments, "--max-seconds", "0"])
    assert "run the same command" in capsys.readouterr().out and not (tmp_path / "lora").exists()
    main(arguments)
    pipe = StableDiffusion3Pipeline.from_pretrained(model)
    pipe.load_lora_weights(tmp_path / "lora")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid", "n_harpg"])
def test_two_processes_train_together(model, tmp_path, name):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["-m", "trimtab.recipes.finetune_reward", "--model", str(model), "--output", str(tmp_path), *ARGUMENTS]
    done = subprocess.run(
        [*launch, "--estimator", name, "--gate", "1"], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["drawn"] >= 8  # four rollouts in each of two processes
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
