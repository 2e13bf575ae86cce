"""A posterior over a pipeline's noise: its likelihood, what it costs, files, errors; the bundled model's pictures."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.pipelines import GenerationMap, NoisePosterior
from trimtab.rewards import CallableReward

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)
CALL = {"num_inference_steps": 2, "guidance_scale": 1.0}


def contrast(images, prompts):
    return 10 * images.std((1, 2, 3))


REWARD = CallableReward(contrast, differentiable=True)


@pytest.fixture(scope="module")
def pipe():
    made = tiny_pipeline("sd3")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def fitted(pipe):
    posterior = NoisePosterior(pipe, "a cat", reward=REWARD, temperature=0.01, num_components=2, **CALL)
    return posterior, posterior.fit(num_steps=6, num_starts=8, lr=0.1, start_scale=0.5)


def test_its_likelihood_is_the_reward_over_the_temperature(pipe):
    posterior = NoisePosterior(pipe, "a cat", reward=REWARD, temperature=0.2, batch_size=1, **CALL)
    f = GenerationMap(pipe, "a cat", **CALL)
    z = f.sample_latents(2, torch.Generator().manual_seed(0)).requires_grad_()
    wanted = contrast(f(z), None) / 0.2
    flat = z.detach().flatten(1).requires_grad_()
    found = posterior._log_likelihood(flat)
    weights = torch.tensor([1.0, -2.0])
    (exact,) = torch.autograd.grad((weights * wanted).sum(), z)
    (ours,) = torch.autograd.grad((weights * found).sum(), flat)
    assert torch.allclose(found, wanted, rtol=1e-4) and torch.allclose(ours, exact.flatten(1), rtol=1e-3, atol=1e-5)


def test_a_measurements_likelihood_is_gaussian(pipe):
    def operator(images):
        return images[:, :, ::2, ::2]

    f = GenerationMap(pipe, "a cat", **CALL)
    z = f.sample_latents(2, torch.Generator().manual_seed(0))
    y = operator(f(z[:1]))[0] + 0.1
    posterior = NoisePosterior.from_measurement(pipe, "a cat", y, operator, 0.5, **CALL)
    found = posterior._log_likelihood(z.flatten(1))
    exact = torch.distributions.Normal(operator(f(z)), 0.5).log_prob(y).flatten(1).sum(1)
    assert float(found[0] - found[1]) == pytest.approx(float(exact[0] - exact[1]), rel=1e-4)
    with pytest.raises(TypeError, match="`temperature`"):
        NoisePosterior.from_measurement(pipe, "a cat", y, operator, 0.5, temperature=1.0, **CALL)
    wrong = NoisePosterior.from_measurement(pipe, "a cat", y, lambda images: images, 0.5, **CALL)
    with pytest.raises(ValueError, match="`operator` gives"):
        wrong.fit(num_steps=1, num_starts=4)


def test_the_bound_rises_and_a_picture_costs_one_sampling(fitted, pipe):
    posterior, found = fitted
    assert float(found.history[-1]) > float(found.history[0]) and found.num_evaluations == 8 + 6 * 2
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, kwargs, out: calls.append(len(out[0])),
                                                    with_kwargs=True)  # fmt: skip
    images = posterior.sample(3, torch.Generator().manual_seed(0), output_type="pt")
    handle.remove()
    assert calls == [3, 3]  # two steps of the sampler, three pictures at once
    assert images.shape == (3, *posterior._task.sampler.image_shape) and float(images.min()) >= 0
    f = GenerationMap(pipe, "a cat", **CALL)
    z = posterior.sample_latents(3, torch.Generator().manual_seed(0))
    assert torch.allclose(f(z), images, atol=1e-5) and z.dtype == torch.float32
    assert torch.equal(posterior.sample(3, output_type="latent"), z)
    assert posterior.sample(1)[0].size == images.shape[-2:]
    assert all(not p.requires_grad for p in posterior.guide.parameters())


def test_it_is_saved_and_loaded(fitted, pipe, tmp_path):
    posterior, _ = fitted
    with pytest.raises(ValueError, match="ends in .safetensors"):
        posterior.save(tmp_path / "posterior.bin")
    path = posterior.save(tmp_path / "posterior.safetensors")
    again = NoisePosterior.load(path, pipe)
    z = posterior.sample_latents(4)
    assert torch.equal(again.sample_latents(4), z) and torch.equal(again.guide.log_prob(z), posterior.guide.log_prob(z))
    assert (again.prompt, again.arguments, again.temperature) == ("a cat", CALL, posterior.temperature)
    content = path.read_bytes()
    for damaged in (content[:-4], b"words"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no whole file"):
            NoisePosterior.load(path, pipe)
    save_file({"a": torch.zeros(1)}, path, {"format": "other"})
    with pytest.raises(ValueError, match="of format 'other'"):
        NoisePosterior.load(path, pipe)
    about = {"prompt": "a cat", "arguments": CALL, "mixture": posterior._mixture, "shape": [1], "temperature": 1.0}
    save_file(posterior.guide.state_dict(), path, {"format": "trimtab.noise_posterior", "about": json.dumps(about)})
    with pytest.raises(ValueError, match="`pipe` takes noise"):
        NoisePosterior.load(path, pipe)


def test_a_fit_can_be_stopped_and_what_is_wrong_is_named(pipe):
    posterior = NoisePosterior(pipe, "a cat", reward=REWARD, num_components=2, strategy="reinforce", **CALL)
    for use in (lambda: posterior.sample(2), lambda: posterior.save("x.safetensors")):
        with pytest.raises(RuntimeError, match="not fitted yet"):
            use()
    found = posterior.fit(num_steps=9, init="random", callback=lambda step, bound: step == 1)
    assert "callback" in found.stopped and found.num_evaluations == 2 and len(posterior.sample(1)) == 1
    for arguments, words in (
        ({"num_starts": 1}, "num_starts"),
        ({"init": "best"}, "init"),
        ({"start_scale": 1.0}, "start_scale"),
    ):
        with pytest.raises(ValueError, match=f"`{words}`"):
            posterior.fit(**arguments)
    for arguments, words in (({"temperature": 0.0}, "temperature"), ({"family": "full"}, "family"),
                             ({"reward": CallableReward(contrast)}, "reward")):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{words}`"):
            NoisePosterior(pipe, "a cat", **{"reward": REWARD, **arguments}, **CALL)
    with pytest.raises(TypeError, match="`prompt`"):
        NoisePosterior(pipe, ["a cat"], reward=REWARD, **CALL)


@pytest.mark.slow
def test_the_bundled_models_pictures_are_liked_more_and_differ():
    from trimtab.benchmarks.noise_optimization import DISTILLED, load

    pipe = load()
    posterior = NoisePosterior(pipe, "three owls on a pink background", num_components=4, batch_size=8, **DISTILLED)
    posterior.fit(num_steps=5, num_starts=16)
    images = posterior.sample(4, output_type="pt")
    prior = posterior._pictures(posterior._task.sampler.sample_latents(8, torch.Generator().manual_seed(5)))
    texts = ["three owls on a pink background"] * 8
    assert float(pipe.reward(images, texts[:4]).mean()) > float(pipe.reward(prior, texts).mean()) + 0.2
    features = torch.nn.functional.normalize(pipe.reward.image_features(images), dim=1)
    assert float((features @ features.T).triu(1).max()) < 0.9999
