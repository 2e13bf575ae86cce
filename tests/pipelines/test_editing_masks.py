"""Edits under a mask by every method: what is outside stays, what is inside is the method's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.pipelines.test_editing import FAMILIES, as_tensor, edit, fixed, pipeline, prompts, size
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab.assets import asset_path
from trimtab.pipelines import EditPipeline, GenerationMap
from trimtab.pipelines.edit_methods import METHODS, controlled_sample, flowedit
from trimtab.pipelines.flowopt_mask import BLENDS
from trimtab.recipes.emoji_scenes import Scene, SceneObject

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS, "ignore:.torch.jit.script. is deprecated")


def upper_half(name: str) -> torch.Tensor:
    mask = torch.zeros(1, *size(name))
    mask[:, : size(name)[0] // 2] = 1.0
    return mask


CASES = [
    *((name, "flowedit") for name in FAMILIES),
    *((name, "fireflow") for name in ("flux", "z-image")),
    *(("sd3", method) for method in METHODS if method != "flowedit"),
    ("sd15", "sdedit"),
    ("sd15", "ode-inversion"),
]


@pytest.mark.parametrize("name, method", CASES)
def test_latents_outside_are_the_pictures_and_pixels_its_own(name: str, method: str) -> None:
    pipe, mask = pipeline(name), upper_half(name)
    options = {"strength": 0.75, "mask_image": mask}
    kept = edit(name, method, pipe, **options)
    whole = edit(name, method, pipe, **(options | {"mask_image": torch.ones_like(mask)}))
    free = edit(name, method, pipe, strength=0.75)
    torch.testing.assert_close(whole.latents, free.latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.images, free.images, rtol=1e-5, atol=1e-5)
    outside = size(name)[0] // 2
    assert torch.equal(kept.images[:, :, outside:], as_tensor(name)[:, :, outside:])
    assert not torch.equal(kept.images[:, :, :outside], as_tensor(name)[:, :, :outside])
    same = (kept.latents - encoded(name, pipe)).abs() < 1e-4
    assert 0.4 < same.float().mean() < 0.6  # the latents of the lower half, and only those


def encoded(name: str, pipe: Any) -> torch.Tensor:
    texts = prompts(name)
    embeddings = {k: v for k, v in texts.items() if k not in ("prompt", "source_prompt", "source_kwargs")}
    prompt = texts["prompt"][0] if texts["prompt"] else None
    return GenerationMap(pipe, prompt, output="latent", **embeddings, **fixed(name)).encode(as_tensor(name))


def test_surroundings_are_on_the_way_that_the_velocities_are_asked_about() -> None:
    """Outside of the mask the network sees (1 - s) y + s eps with one eps, at each step."""
    y, sigmas = torch.full((1, 1, 4, 4), 2.0), torch.tensor([0.8, 0.5, 0.3, 0.0])
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2, :] = 1
    seen = []

    def velocity(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        seen.append((x[..., 2:, :].clone(), float(s)))
        return torch.sin(3 * x) + s

    start = y * 0.2 + 0.8 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    result = controlled_sample(velocity, sigmas, start, y, mask, eta=0.3)
    noises = [(x - (1 - s) * 2.0) / s for x, s in seen]
    for noise in noises[1:]:
        torch.testing.assert_close(noise, noises[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(result[..., 2:, :], y[..., 2:, :])

    seen.clear()
    result = flowedit(lambda x, s: 0 * x, velocity, sigmas, y, torch.Generator().manual_seed(2), None, mask, n_min=2)
    noises = [(x - (1 - s) * 2.0) / s for x, s in seen[1:]]  # the last two, which sample
    torch.testing.assert_close(noises[1], noises[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result[..., 2:, :], y[..., 2:, :], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["flowedit", "uni-inv"])
def test_blends_of_a_whole_edit(method: str) -> None:
    """Under each blend the surroundings are the picture's; "none" gives the decoded latents as they are."""
    pipe, mask = pipeline("sd3"), upper_half("sd3")
    results = {
        blend: edit("sd3", method, pipe, mask_image=mask, blend=blend).images for blend in (None, "none", *BLENDS)
    }
    assert torch.equal(results[None], results["feather"])
    source = as_tensor("sd3")
    for blend in BLENDS:
        torch.testing.assert_close(results[blend][:, :, 8:], source[:, :, 8:], rtol=0, atol=1e-5)
    assert not torch.allclose(results["none"][:, :, 8:], source[:, :, 8:], atol=1e-3)
    assert not torch.allclose(results["poisson"][:, :, :8], results["feather"][:, :, :8], atol=1e-3)
    with pytest.raises(ValueError, match="`blend` is 'laplace'; takes None, 'none' or one of 'feather', 'poisson'"):
        edit("sd3", method, pipe, mask_image=mask, blend="laplace")


def test_bad_masks() -> None:
    with pytest.raises(ValueError, match="`mask_image` is black everywhere"):
        edit("sd3", "flowedit", mask_image=torch.zeros(1, 16, 16))
    with pytest.raises(ValueError, match="`mask_image` has 2 masks for 1 pictures"):
        edit("sd3", "flowedit", mask_image=[torch.ones(1, 16, 16)] * 2)


def test_an_edit_under_a_mask_by_the_bundled_model_has_no_seam() -> None:
    """Free, the edit changes the colour of the ground; under a mask it meets the picture's, under any blend."""
    edit_pipeline = EditPipeline.from_pretrained(asset_path("emoji-scenes"), method="flowedit")
    edit_pipeline.pipe.set_progress_bar_config(disable=True)
    picture = Scene((SceneObject("cat", (36, 36, 56)),), "lavender").render()
    mask = torch.zeros(1, 128, 128)
    mask[:, 16:112, 16:112] = 1.0
    run = {"num_inference_steps": 8, "output_type": "np", "max_sequence_length": 16}
    prompts = {"prompt": "a dog on a mint background", "source_prompt": "a cat on a lavender background"}
    free = edit_pipeline(picture, **prompts, **run).images[0]
    changed = abs(free - picture)[16:112, 14:17].mean()
    jumps = {}
    for blend in ("none", "feather", "poisson"):
        image = edit_pipeline(picture, **prompts, **run, mask_image=mask, blend=blend).images[0]
        jumps[blend] = abs(image[16:112, 16] - image[16:112, 14]).mean() / changed
        assert abs(image - picture)[44:84, 44:84].mean() > 0.05, blend
    assert max(jumps.values()) < 0.35, jumps
    assert jumps["poisson"] < 0.5 * jumps["feather"], jumps
