"""attach() in every family: the real pipeline classes with tiny random weights, one row each."""

import pytest
import torch

from tests.more_tiny_pipelines import GUIDED, guided_pipeline
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab.guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    Guidance,
    SkipLayerGuidance,
    attach,
    to_x0,
)
from trimtab.guidance.attach import _family_of
from trimtab.guidance.batching import batch_rows
from trimtab.guidance.interception import intercept_method

pytestmark = [
    pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # in Kolors
]

STEPS = 4
W = 5.0
PLAIN = {"adaptive_projected_guidance_momentum": None, "adaptive_projected_guidance_rescale": 0.0, "eta": 1.0}
ALWAYS = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}


def run(pipe, name, scale=W, *, seed=0, rows=(0,), **extra):
    """The stock call with guidance on, at the usual scale w."""
    scale += _family_of(pipe).guidance.scale_offset
    call = GUIDED[name].call(rows, scale)
    generator = torch.Generator().manual_seed(seed)
    settings = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generator}
    return pipe(**call, **settings, **extra)[0]


class Recorder(Guidance):
    """Plain guidance that keeps what it was told."""

    def __init__(self, guidance_scale):
        super().__init__(guidance_scale)
        self.seen = []

    def combine(self, pred_cond, pred_uncond):
        levels = (self._prediction, self._next_prediction)
        self.seen.append((pred_cond, pred_uncond, self._sample, *levels, self._step))
        return pred_uncond + self.scale * (pred_cond - pred_uncond)


@pytest.fixture(params=GUIDED, scope="module")
def case(request):
    return request.param, guided_pipeline(request.param)


def denoiser_of(pipe):
    return getattr(pipe, _family_of(pipe).denoisers[0])


def test_rule_is_cfg(case):
    """The identity: the pipeline's own output, whatever its own scale says."""
    name, pipe = case
    own = run(pipe, name)
    with attach(pipe, ClassifierFreeGuidance(W)):
        guided = run(pipe, name, 2.0)
    assert (guided - own).abs().max() <= 1e-5 * own.abs().max()
    assert (run(pipe, name, 2.0) - own).abs().max() > 1e-3 * own.abs().max()
    with attach(pipe, AdaptiveProjectedGuidance(W, **PLAIN)):
        guided = run(pipe, name, 2.0)
    assert (guided - own).abs().max() <= 1e-5 * own.abs().max()


def test_nothing_is_left(case):
    name, pipe = case
    own = run(pipe, name)
    denoiser = denoiser_of(pipe)
    before = (set(vars(pipe)), set(vars(pipe.scheduler)), set(vars(denoiser)))
    with attach(pipe, AdaptiveProjectedGuidance(9.0)):
        guided = run(pipe, name)
    assert torch.isfinite(guided).all() and not torch.equal(guided, own)
    assert (set(vars(pipe)), set(vars(pipe.scheduler)), set(vars(denoiser))) == before
    assert not denoiser._forward_hooks and not denoiser._forward_pre_hooks
    assert torch.equal(run(pipe, name), own)


def test_denoised_prediction_is_right(case):
    """Against the scheduler: its next latent is a mixture of our x0 and noise at its next level.

    All these schedulers take a first step of first order, x' = alpha' x0 + sigma' n with n the noise in x.
    """
    name, pipe = case
    recorder, steps = Recorder(W), []

    def spy(original, model_output, timestep, sample, *args, **kwargs):
        result = original(model_output, timestep, sample, *args, **kwargs)
        steps.append((model_output, sample, result))
        return result

    undo = intercept_method(pipe.scheduler, "step", spy)
    try:
        with attach(pipe, recorder, renormalize=False):
            run(pipe, name)
    finally:
        undo()
    assert [seen[-1] for seen in recorder.seen] == list(range(STEPS))
    cond, uncond, sample, here, after, _ = recorder.seen[0]
    model_output, given, result = steps[0]
    assert torch.equal(sample, given)
    assert torch.allclose(model_output, uncond + W * (cond - uncond), atol=1e-6)
    x0 = to_x0(model_output, sample, here)
    if type(pipe.scheduler).__name__ == "DDPMScheduler":  # stochastic: it tells its own x0
        t = pipe.scheduler.timesteps[0]
        theirs = pipe.scheduler.step(model_output, t, sample).pred_original_sample
        assert (x0 - theirs).abs().max() <= 1e-4 * theirs.abs().max()
        return
    noise = (sample - here.alpha * x0) / here.sigma
    expected = after.alpha * x0 + after.sigma * noise
    assert (result[0] - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_unconditional_half_is_dropped(case):
    """Where nothing is guided the denoiser computes the conditional part alone, and the result is its own."""
    name, pipe = case
    rows = []
    denoiser = denoiser_of(pipe)
    original = denoiser.forward

    def forward(*args, **kwargs):
        rows.append(batch_rows(args, kwargs))
        return original(*args, **kwargs)

    denoiser.forward = forward
    try:
        with attach(pipe, ClassifierFreeGuidance(W, start=0.5)):
            guided = run(pipe, name)
    finally:
        del denoiser.forward
    traits = _family_of(pipe).guidance
    assert rows == ([1, 1, 2, 2] if traits.calls == "batched" else [1] * 6)
    with attach(pipe, ClassifierFreeGuidance(lambda sigma: 1.0)):
        unguided = run(pipe, name)
    off = run(pipe, name, 1.0)
    assert (unguided - off).abs().max() <= 1e-5 * off.abs().max()
    assert not torch.allclose(guided, unguided)


DETERMINISTIC = [name for name in GUIDED if name != "hunyuan-dit"]  # DDPM draws noise for the whole batch


@pytest.mark.parametrize("case", DETERMINISTIC, indirect=True)
def test_two_prompts_give_what_each_gives_alone(case):
    name, pipe = case
    noise = torch.randn(2, *GUIDED[name].latent_shape, generator=torch.Generator().manual_seed(3))
    with attach(pipe, AdaptiveProjectedGuidance(9.0)):
        both = run(pipe, name, rows=(0, 1), latents=noise)
        single = [run(pipe, name, rows=(k,), latents=noise[k : k + 1]) for k in range(2)]
    assert (both - torch.cat(single)).abs().max() <= 1e-3 * both.abs().max()


def test_third_prediction(case):
    """In one call or in two, the same; on its own it needs no unconditional half."""
    name, pipe = case
    results = []
    for batch_extra in (True, False):
        with attach(pipe, SkipLayerGuidance(W, **ALWAYS), batch_extra=batch_extra):
            results.append(run(pipe, name))
    assert (results[0] - results[1]).abs().max() <= 1e-4 * results[1].abs().max()
    own = run(pipe, name)
    assert (results[0] - own).abs().max() > 1e-4 * own.abs().max()
    with attach(pipe, AutoGuidance(1.0)):
        assert torch.allclose(run(pipe, name), run(pipe, name, 1.0), atol=1e-5)
    with attach(pipe, AutoGuidance(2.0, weak_denoiser=denoiser_of(guided_pipeline(name)))):  # as good as it
        assert torch.allclose(run(pipe, name), run(pipe, name, 1.0), atol=1e-4)
    denoiser = denoiser_of(pipe)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())
