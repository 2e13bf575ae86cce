"""attach() in every family: the real pipeline classes with tiny random weights, one row each."""

import pytest
import torch

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, TINY, tiny_pipeline
from trimtab.guidance import AdaptiveProjectedGuidance, ClassifierFreeGuidance, Guidance, attach
from trimtab.guidance.attach import _family_of

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

STEPS = 4
W = 5.0
PLAIN = {"adaptive_projected_guidance_momentum": None, "adaptive_projected_guidance_rescale": 0.0, "eta": 1.0}


def argument_of(pipe):
    family = _family_of(pipe)
    return family.guidance_argument if family.name != "flux" else "true_cfg_scale"


def call_of(name, pipe, scale=W):
    """The stock call's arguments with guidance on, at the usual scale w."""
    traits = _family_of(pipe).guidance
    call = {**TINY[name].call, argument_of(pipe): scale + traits.scale_offset}
    if "negative_prompt" in traits.switch:
        call["negative_prompt"] = "bad quality"
    return call


def run(pipe, call, seed=0, prompt="a red cat"):
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=STEPS, output_type="latent", generator=generator, **call)[0]


class Recorder(Guidance):
    """Plain guidance that keeps what it was told."""

    def __init__(self, guidance_scale):
        super().__init__(guidance_scale)
        self.seen = []

    def combine(self, pred_cond, pred_uncond):
        self.seen.append((pred_cond, pred_uncond, self._sample, self._prediction, self._step))
        return pred_uncond + self.scale * (pred_cond - pred_uncond)


@pytest.fixture(params=TINY, scope="module")
def case(request):
    return request.param, tiny_pipeline(request.param)


def test_rule_is_cfg(case):
    """The identity: the pipeline's own output, whatever its own scale says."""
    name, pipe = case
    own = run(pipe, call_of(name, pipe))
    with attach(pipe, ClassifierFreeGuidance(W)):
        guided = run(pipe, call_of(name, pipe, 2.0))
    assert (guided - own).abs().max() <= 1e-5 * own.abs().max()
    assert (run(pipe, call_of(name, pipe, 2.0)) - own).abs().max() > 1e-4 * own.abs().max()
    with attach(pipe, AdaptiveProjectedGuidance(W, **PLAIN)):
        guided = run(pipe, call_of(name, pipe, 2.0))
    assert (guided - own).abs().max() <= 1e-5 * own.abs().max()


def test_nothing_is_left(case):
    name, pipe = case
    own = run(pipe, call_of(name, pipe))
    denoiser = getattr(pipe, _family_of(pipe).denoisers[0])
    before = (set(vars(pipe)), set(vars(pipe.scheduler)), set(vars(denoiser)))
    with attach(pipe, AdaptiveProjectedGuidance(9.0)):
        guided = run(pipe, call_of(name, pipe))
    assert torch.isfinite(guided).all() and not torch.equal(guided, own)
    assert (set(vars(pipe)), set(vars(pipe.scheduler)), set(vars(denoiser))) == before
    assert not denoiser._forward_hooks and not denoiser._forward_pre_hooks
    assert torch.equal(run(pipe, call_of(name, pipe)), own)


def test_denoised_prediction_is_right(case):
    """With one step left, the scheduler returns its denoised prediction: what ours says of the guided output."""
    name, pipe = case
    recorder = Recorder(W)
    with attach(pipe, recorder, renormalize=False):
        final = run(pipe, call_of(name, pipe))
    assert [seen[-1] for seen in recorder.seen] == list(range(STEPS))
    cond, uncond, sample, prediction, _ = recorder.seen[-1]
    guided = uncond + W * (cond - uncond)
    x0 = prediction.skip * sample + prediction.out * guided
    assert final.shape == x0.shape
    levels = [seen[3].noise_to_signal for seen in recorder.seen]
    assert levels == sorted(levels, reverse=True) and levels[-1] > 0
    if ends_clean(pipe.scheduler):
        assert (x0 - final).abs().max() <= 1e-4 * final.abs().max()


def ends_clean(scheduler):
    """Whether the last step of the scheduler goes to no noise at first order."""
    return getattr(scheduler.config, "set_alpha_to_one", True) is not False and hasattr(scheduler, "sigmas")


def test_unconditional_half_is_dropped(case):
    """Where nothing is guided the denoiser computes the conditional part alone, and the result is its own."""
    name, pipe = case
    rows = []
    denoiser = getattr(pipe, _family_of(pipe).denoisers[0])

    def count(module, args, kwargs):
        latents = args[0] if args else next(kwargs[k] for k in ("hidden_states", "sample", "x") if k in kwargs)
        rows.append(len(latents))

    with attach(pipe, ClassifierFreeGuidance(W, start=0.5)):
        original = denoiser.forward

        def forward(*args, **kwargs):
            count(denoiser, args, kwargs)
            return original(*args, **kwargs)

        denoiser.forward = forward
        guided = run(pipe, call_of(name, pipe))
        del denoiser.forward
    traits = _family_of(pipe).guidance
    assert rows == ([1, 1, 2, 2] if traits.calls == "batched" else [1] * 6)
    recorder = Recorder(lambda sigma: 1.0)  # w = 1 everywhere
    with attach(pipe, recorder):
        unguided = run(pipe, call_of(name, pipe))
    off = {**call_of(name, pipe), argument_of(pipe): 1.0 + traits.scale_offset}
    assert (unguided - run(pipe, off)).abs().max() <= 1e-5 * unguided.abs().max()
    assert not torch.allclose(guided, unguided)


def test_batches_and_several_images(case):
    """Two prompts give what each gives alone."""
    name, pipe = case
    call = call_of(name, pipe)
    if "negative_prompt" in call:
        call["negative_prompt"] = ["bad quality"] * 2
    prompts = ["a red cat", "two dog on a sky background"]
    shape = TINY[name].latent_shape
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    settings = {"num_inference_steps": STEPS, "output_type": "latent"}
    guider = AdaptiveProjectedGuidance(9.0)
    with attach(pipe, guider):
        both = pipe(prompts, latents=noise, **settings, **call)[0]
        if "negative_prompt" in call:
            call["negative_prompt"] = "bad quality"
        single = [pipe(p, latents=noise[i : i + 1], **settings, **call)[0] for i, p in enumerate(prompts)]
    assert (both - torch.cat(single)).abs().max() <= 1e-3 * both.abs().max()
