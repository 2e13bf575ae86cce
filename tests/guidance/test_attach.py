"""attach(): the stock pipelines of all families, real classes with tiny random weights."""

import math

import diffusers
import pytest
import torch

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, TINY, tiny_pipeline
from trimtab.guidance import AdaptiveProjectedGuidance, ClassifierFreeGuidance, attach

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

STEPS = 4
PLAIN = {"adaptive_projected_guidance_momentum": None, "adaptive_projected_guidance_rescale": 0.0, "eta": 1.0}


def run(pipe, seed=0, prompt="a red cat", **call):
    generator = torch.Generator().manual_seed(seed)
    arguments = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generator, **call}
    return pipe(prompt, **arguments).images


@pytest.fixture
def sd3():
    return tiny_pipeline("sd3")


CALL = TINY["sd3"].call


def state_of(pipe):
    """Everything attach() could leave behind in the pipeline's parts."""
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    return {
        name: (
            set(vars(part)),
            len(getattr(part, "_forward_hooks", ())) + len(getattr(part, "_forward_pre_hooks", ())),
            vars(part).get("step"),
            vars(part).get("set_timesteps"),
            vars(part).get("forward"),
        )
        for name, part in parts.items()
    }


def test_the_guiders_scale_holds(sd3):
    plain = run(sd3, **{**CALL, "guidance_scale": 5.0})
    with attach(sd3, ClassifierFreeGuidance(5.0)):
        guided = run(sd3, **{**CALL, "guidance_scale": 2.0})
    assert torch.allclose(guided, plain, atol=1e-6)
    assert not torch.allclose(run(sd3, **{**CALL, "guidance_scale": 2.0}), plain, atol=1e-2)


def test_plain_apg_is_the_pipelines_own_guidance(sd3):
    plain = run(sd3, **CALL)
    with attach(sd3, AdaptiveProjectedGuidance(CALL["guidance_scale"], **PLAIN)):
        assert torch.allclose(run(sd3, **CALL), plain, atol=1e-5)
    with attach(sd3, AdaptiveProjectedGuidance(CALL["guidance_scale"])):
        assert not torch.allclose(run(sd3, **CALL), plain, atol=1e-2)


def test_removal_leaves_no_trace(sd3):
    run(sd3, **CALL)
    plain, before = run(sd3, **CALL), state_of(sd3)
    handle = attach(sd3, AdaptiveProjectedGuidance(9.0))
    assert handle.attached
    run(sd3, **CALL)
    handle.remove()
    handle.remove()
    assert not handle.attached
    assert state_of(sd3) == before
    assert torch.equal(run(sd3, **CALL), plain)


def test_removal_after_an_error(sd3):
    run(sd3, **CALL)
    before = state_of(sd3)
    with pytest.raises(RuntimeError, match="stop"), attach(sd3, AdaptiveProjectedGuidance(9.0)):

        def stop(*_):
            raise RuntimeError("stop")

        run(sd3, callback_on_step_end=stop, **CALL)
    assert state_of(sd3) == before


def test_runs_repeat_and_do_not_remember(sd3):
    """The momentum of one run does not reach the next, also after a run that was broken off."""
    with attach(sd3, AdaptiveProjectedGuidance(9.0)):
        first = run(sd3, **CALL)

        def stop(pipe, step, *_):
            if step == 1:
                raise KeyboardInterrupt
            return {}

        with pytest.raises(KeyboardInterrupt):
            run(sd3, callback_on_step_end=stop, **CALL)
        assert torch.equal(run(sd3, **CALL), first)
        assert torch.equal(run(sd3, num_inference_steps=STEPS, **CALL), first)


def test_diffusers_own_guiders(sd3):
    plain = run(sd3, **{**CALL, "guidance_scale": 6.0})
    with attach(sd3, diffusers.ClassifierFreeGuidance(6.0)):
        assert torch.allclose(run(sd3, **CALL), plain, atol=1e-6)
    theirs = diffusers.AdaptiveProjectedGuidance(
        5.0,
        adaptive_projected_guidance_momentum=-0.5,
        adaptive_projected_guidance_rescale=2.0,
        eta=0.0,
        use_original_formulation=True,
    )
    ours = AdaptiveProjectedGuidance(6.0, adaptive_projected_guidance_rescale=2.0, space="raw")
    results = []
    for guider in (theirs, ours):
        with attach(sd3, guider):
            results.append(run(sd3, **CALL))
    assert torch.allclose(*results, atol=1e-5)
    with attach(sd3, diffusers.ClassifierFreeZeroStarGuidance(6.0)):
        assert torch.isfinite(run(sd3, **CALL)).all()


def test_refusals(sd3):
    guider = AdaptiveProjectedGuidance(5.0)
    with pytest.raises(TypeError, match="BaseGuidance"):
        attach(sd3, 7.5)
    with pytest.raises(ValueError, match="changes the denoiser"):
        attach(sd3, diffusers.SkipLayerGuidance(skip_layer_guidance_layers=[0]))
    with pytest.raises(NotImplementedError, match="DDPMPipeline"):
        attach(
            diffusers.DDPMPipeline(
                diffusers.UNet2DModel(
                    block_out_channels=(32, 64),
                    down_block_types=("DownBlock2D",) * 2,
                    up_block_types=("UpBlock2D",) * 2,
                ),
                diffusers.DDPMScheduler(),
            ),
            guider,
        )
    other = tiny_pipeline("sd3")
    sharing = diffusers.StableDiffusion3Pipeline(**{**other.components, "transformer": sd3.transformer})
    with attach(sd3, guider):
        with pytest.raises(ValueError, match="attached already"):
            attach(sd3, AdaptiveProjectedGuidance(5.0))
        with pytest.raises(ValueError, match="AdaptiveProjectedGuidance.*attached already"):
            attach(other, guider)
        with pytest.raises(ValueError, match="SD3Transformer2DModel.*attached already"):
            attach(sharing, AdaptiveProjectedGuidance(5.0))
    with attach(other, guider):
        pass


def test_without_the_pipelines_guidance(sd3):
    with attach(sd3, AdaptiveProjectedGuidance(5.0)), pytest.raises(ValueError, match="guidance_scale > 1"):
        run(sd3, **{**CALL, "guidance_scale": 1.0})
    with attach(sd3, AdaptiveProjectedGuidance(1.0)):  # asks for nothing
        unguided = run(sd3, **{**CALL, "guidance_scale": 1.0})
    assert torch.equal(unguided, run(sd3, **{**CALL, "guidance_scale": 1.0}))


def test_scale_of_nan():
    with pytest.raises(ValueError, match="guidance_scale"):
        AdaptiveProjectedGuidance(math.nan)
