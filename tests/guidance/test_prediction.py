"""Conversions to denoised predictions, against what the schedulers themselves compute."""

import math

import diffusers
import pytest
import torch

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab.guidance.prediction import PREDICTION_TYPES, AffinePrediction, NoiseSchedule, from_x0, to_x0

pytestmark = [
    pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

SHAPE = (2, 3, 4, 4)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(("alpha", "sigma"), [(0.8, 0.6), (1.0, 3.0), (0.3, 0.7)])
def test_round_trip(kind, alpha, sigma):
    output, x = tensors(torch.float64)
    at = AffinePrediction.of(kind, alpha, sigma)
    assert torch.allclose(from_x0(to_x0(output, x, at), x, at), output, atol=1e-12)
    assert torch.allclose(to_x0(from_x0(output, x, at), x, at), output, atol=1e-12)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.8, 0.6), (1.0, 3.0)])
def test_a_perfect_network_gives_the_data(alpha, sigma):
    """x = alpha x0 + sigma n: each parametrisation's definition of its target, fed back, gives x0."""
    x0, noise = tensors(torch.float64)
    x = alpha * x0 + sigma * noise
    scale = math.hypot(alpha, sigma)
    targets = {
        "epsilon": noise,
        "v_prediction": (alpha * noise - sigma * x0) / scale,
        "flow_prediction": noise - x0,
        "sample": x0,
    }
    for kind, target in targets.items():
        assert torch.allclose(to_x0(target, x, AffinePrediction.of(kind, alpha, sigma)), x0, atol=1e-12), kind


def test_half_precision_is_widened():
    output, x = (t.half() for t in tensors())
    x0 = to_x0(output, x, AffinePrediction.of("epsilon", 0.05, 0.9987))
    assert x0.dtype == torch.float32
    wide = to_x0(output.double(), x.double(), AffinePrediction.of("epsilon", 0.05, 0.9987))
    assert torch.allclose(x0.double(), wide, atol=1e-4)


def original(scheduler, output, t, x):
    """What the scheduler takes for x0 at this step."""
    return scheduler.step(output, t, x).pred_original_sample


def converted(scheduler, output, t, x):
    """DPM-Solver++ and UniPC keep it as their converted model output."""
    if scheduler.step_index is None:
        scheduler._init_step_index(t)
    return scheduler.convert_model_output(output, sample=x)


SCHEDULERS = {
    "ddim-epsilon": (diffusers.DDIMScheduler, {**BETAS, "clip_sample": False}, original),
    "ddim-v": (
        diffusers.DDIMScheduler,
        {
            **BETAS,
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
        original,
    ),
    "ddim-sample": (
        diffusers.DDIMScheduler,
        {**BETAS, "clip_sample": False, "prediction_type": "sample"},
        original,
    ),
    "ddpm": (diffusers.DDPMScheduler, {**BETAS, "clip_sample": False}, original),
    "euler-epsilon": (diffusers.EulerDiscreteScheduler, BETAS, original),
    "euler-v": (diffusers.EulerDiscreteScheduler, {**BETAS, "prediction_type": "v_prediction"}, original),
    "euler-karras": (diffusers.EulerDiscreteScheduler, {**BETAS, "use_karras_sigmas": True}, original),
    "euler-ancestral": (diffusers.EulerAncestralDiscreteScheduler, BETAS, original),
    "heun": (diffusers.HeunDiscreteScheduler, BETAS, original),
    "lms": (diffusers.LMSDiscreteScheduler, BETAS, original),
    "kdpm2": (diffusers.KDPM2DiscreteScheduler, BETAS, original),
    "lcm": (diffusers.LCMScheduler, {**BETAS, "clip_sample": False}, None),
    "dpm++": (diffusers.DPMSolverMultistepScheduler, BETAS, converted),
    "dpm++-v-karras": (
        diffusers.DPMSolverMultistepScheduler,
        {**BETAS, "prediction_type": "v_prediction", "use_karras_sigmas": True},
        converted,
    ),
    "dpm++-flow": (
        diffusers.DPMSolverMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        converted,
    ),
    "unipc": (diffusers.UniPCMultistepScheduler, BETAS, converted),
    "unipc-flow": (
        diffusers.UniPCMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        converted,
    ),
    "edm-euler": (diffusers.EDMEulerScheduler, {}, original),
    "edm-euler-v": (diffusers.EDMEulerScheduler, {"prediction_type": "v_prediction"}, original),
    "edm-dpm++": (diffusers.EDMDPMSolverMultistepScheduler, {}, converted),
}


@pytest.mark.parametrize("name", [name for name, case in SCHEDULERS.items() if case[2] is not None])
def test_equals_the_schedulers_own(name):
    kind, config, own = SCHEDULERS[name]
    scheduler = kind(**config)
    scheduler.set_timesteps(6)
    schedule = NoiseSchedule(scheduler)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        output = torch.randn(SHAPE, generator=generator)
        scheduler.scale_model_input(x, t)
        before = x
        ours = to_x0(output, before, schedule[i])
        if own is converted:
            theirs = own(scheduler, output, t, before)
            x = scheduler.step(output, t, before).prev_sample
        else:
            result = scheduler.step(output, t, before)
            theirs, x = result.pred_original_sample, result.prev_sample
        if theirs is not None:  # Heun, KDPM2: None in diffusers' output at second evaluations
            scale = theirs.abs().max()
            assert (ours - theirs).abs().max() <= 2e-6 * max(scale, 1), (i, float(t))
    assert len(schedule) == len(scheduler.timesteps)


@pytest.mark.parametrize("dynamic", [False, True])
def test_flow_match_euler(dynamic):
    """Its step gives only the next latent: x + (s' - s) v, and the last one, at s' = 0, is x0 itself."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    scheduler.set_timesteps(5, **({"mu": 0.8} if dynamic else {}))
    schedule = NoiseSchedule(scheduler)
    output, x = tensors()
    for i, t in enumerate(scheduler.timesteps):
        after = scheduler.step(output, t, x).prev_sample
        x0 = to_x0(output, x, schedule[i])
        noise = x + (1 - schedule[i].sigma) * output  # the flow's other end
        end = schedule[i + 1]
        assert torch.allclose(end.alpha * x0 + end.sigma * noise, after, atol=1e-5)
        last, x = x0, after
    assert torch.allclose(last, x, atol=1e-6)


def test_heun_evaluates_twice_at_known_levels():
    """Heun's second evaluation lies at the step's end; the noise levels follow its own interleaved sigmas."""
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(3)
    schedule = NoiseSchedule(scheduler)
    levels = [schedule[i].sigma for i in range(len(schedule))]
    assert len(levels) == 5
    assert levels[1] == levels[2] and levels[3] == levels[4]
    assert levels[0] == pytest.approx(1.0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_index_of_finds_each_step(name):
    kind, config, _ = SCHEDULERS[name]
    scheduler = kind(**config)
    scheduler.set_timesteps(6)
    schedule = NoiseSchedule(scheduler)
    for t in scheduler.timesteps:
        assert schedule.timesteps[schedule.index_of(t)] == pytest.approx(float(t))


def test_refusals():
    with pytest.raises(ValueError, match="velocity"):
        AffinePrediction.of("velocity", 1.0, 1.0)
    with pytest.raises(ValueError, match="no output follows"):
        from_x0(*tensors(), AffinePrediction.of("flow_prediction", 1.0, 0.0))
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(3)
    with pytest.raises(NotImplementedError, match="IPNDM"):
        NoiseSchedule(scheduler)
