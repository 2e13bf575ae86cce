"""A guidance rule attached to a pipeline acts inside its generation maps too."""

import diffusers
import pytest
import torch

from tests.pipelines.test_generation_map import seeded, tiny_map
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab.guidance import AdaptiveProjectedGuidance, ClassifierFreeGuidance, attach

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

NAMES = ["sd15", "sd3", "qwen-image"]


@pytest.mark.parametrize("name", NAMES)
def test_classifier_free_guidance_is_the_pipelines_own(name: str) -> None:
    f = tiny_map(name, output="latent")
    z = f.sample_latents(2, seeded(0))
    scale = f._arguments[f.family.guidance_argument]
    own = f(z)
    with attach(f.pipe, ClassifierFreeGuidance(guidance_scale=scale)):
        torch.testing.assert_close(f(z), own, rtol=1e-4, atol=1e-5)
    with attach(f.pipe, ClassifierFreeGuidance(guidance_scale=2 * scale)):
        assert not torch.allclose(f(z), own, atol=1e-3)
    assert torch.equal(f(z), own)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_through_an_attached_rule(name: str) -> None:
    """Taken after the rule was removed: the steps are computed again without it, and nothing changes."""
    f = tiny_map(name, output="latent")
    z = f.sample_latents(1, seeded(0)).requires_grad_()
    weights = torch.randn(z.shape, generator=seeded(1))
    guider = AdaptiveProjectedGuidance(guidance_scale=6.0, adaptive_projected_guidance_momentum=-0.5, eta=0.3)

    def value(z: torch.Tensor) -> torch.Tensor:
        with attach(f.pipe, guider):
            return (f(z) * weights).sum()

    (grad,) = torch.autograd.grad(value(z), z)
    direction, step = grad / grad.norm(), 1e-2
    with torch.no_grad():
        difference = (value(z + step * direction) - value(z - step * direction)) / (2 * step)
    assert abs(difference / grad.norm() - 1) < 1e-2


def test_with_a_scheduler_of_the_maps_own() -> None:
    """The rule follows the scheduler that runs, call after call."""
    pipe = tiny_map("sd15").pipe
    other = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    f = tiny_map("sd15", pipe=pipe, scheduler=other, output="latent")
    z = f.sample_latents(1, seeded(0))
    own = f(z)
    with attach(pipe, ClassifierFreeGuidance(guidance_scale=10.0)):
        guided = f(z)
        assert torch.equal(f(z), guided)
    expected = tiny_map("sd15", pipe=pipe, scheduler=other, output="latent", guidance_scale=10.0)(z)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(f(z), own)
    assert "step" not in vars(other)
