"""attach() in image-to-image, inpainting and ControlNet pipelines, which start in the middle or have more inputs."""

import pytest
import torch

from tests.more_tiny_pipelines import VARIANTS, variant_call, variant_pipeline
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab.guidance import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    IntervalGuidance,
    PerturbedAttentionGuidance,
    attach,
)

pytestmark = [
    pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # in its own ControlNet
]

PLAIN = {"adaptive_projected_guidance_momentum": None, "adaptive_projected_guidance_rescale": 0.0, "eta": 1.0}


@pytest.fixture(params=VARIANTS, scope="module")
def case(request):
    return request.param, variant_pipeline(request.param)


def run(pipe, name, scale):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # SD3's ControlNet pipeline encodes its picture with the global generator
        return pipe(
            **variant_call(name, scale),
            num_inference_steps=4,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )[0]


def test_rule_is_cfg_and_nothing_is_left(case):
    name, pipe = case
    own = run(pipe, name, 5.0)
    assert (run(pipe, name, 2.0) - own).abs().max() > 1e-3
    for guider in (ClassifierFreeGuidance(5.0), AdaptiveProjectedGuidance(5.0, **PLAIN)):
        with attach(pipe, guider):
            guided = run(pipe, name, 2.0)
        assert (guided - own).abs().max() <= 1e-5 * own.abs().max()
    with attach(pipe, AdaptiveProjectedGuidance(9.0)):
        assert not torch.equal(run(pipe, name, 2.0), own)
    assert torch.equal(run(pipe, name, 5.0), own)


def test_noise_levels_are_those_of_the_truncated_run(case):
    """Steps are counted from where the run starts; noise levels are the scheduler's there."""
    name, pipe = case
    seen = []

    def scale(sigma):
        seen.append(sigma)
        return 5.0

    guider = ClassifierFreeGuidance(scale)
    with attach(pipe, guider):
        run(pipe, name, 2.0)
    started = 3 if "strength" in variant_call(name, 2.0) else 4
    assert guider._num_inference_steps == started and guider._step == started - 1
    distinct = sorted(set(seen), reverse=True)
    assert len(distinct) == started
    with attach(pipe, IntervalGuidance(5.0, sigma_range=(distinct[-1], distinct[0]))):
        interval = run(pipe, name, 2.0)  # the last level is outside
    with attach(pipe, ClassifierFreeGuidance(lambda sigma: 5.0 if sigma > distinct[-1] else 1.0)):
        by_function = run(pipe, name, 2.0)
    assert torch.equal(interval, by_function)


def test_third_prediction(case):
    name, pipe = case
    results = []
    for batch_extra in (True, False):
        with attach(pipe, PerturbedAttentionGuidance(3.0), batch_extra=batch_extra):
            results.append(run(pipe, name, 2.0))
    assert (results[0] - results[1]).abs().max() <= 1e-4 * results[1].abs().max()
