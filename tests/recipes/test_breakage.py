"""Broken pictures: no caption describes them, and emoji-clip's training shows them so."""

import numpy as np
import pytest
import torch

from trimtab.recipes.emoji_scenes import Scene, SceneObject, break_scene, check_scene, sample_scene
from trimtab.recipes.emoji_scenes.breakage import KINDS
from trimtab.recipes.train_clip import ContrastiveLoss, build_clip, degrade, draw_pairs


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_refuses_most(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    scenes = [sample_scene(rng) for _ in range(16)]
    pictures = torch.from_numpy(np.stack([break_scene(scene, rng, kind) for scene in scenes])).movedim(-1, 1)
    verdicts = check_scene(pictures, [scene.caption for scene in scenes])
    assert sum(verdict.correct for verdict in verdicts) <= 7  # it passes sides that differ by less than a quarter


def test_only_the_broken_objects_surroundings_change():
    scene = Scene((SceneObject("cat", (0, 40, 48)), SceneObject("dog", (72, 40, 48))), "sky")
    whole = scene.render()
    for seed in range(20):
        picture = break_scene(scene, np.random.default_rng(seed))
        assert picture.dtype == np.float32 and picture.shape == whole.shape
        assert picture.min() >= 0 and picture.max() <= 1
        changed = np.abs(picture - whole).max(-1) > 0.02
        assert changed.any() and not changed[:8].any() and not changed[-8:].any()


def test_the_same_generator_breaks_alike_and_an_unknown_kind_is_named():
    scene = sample_scene(np.random.default_rng(3))
    pictures = [break_scene(scene, np.random.default_rng(4)) for _ in range(2)]
    assert np.array_equal(*pictures)
    with pytest.raises(ValueError, match="kind must be one of"):
        break_scene(scene, np.random.default_rng(0), "melted")


def test_training_pictures_hold_the_broken_ones_last():
    images, captions, same = draw_pairs(np.random.default_rng(0), 8, broken=4)
    assert images.shape == (12, 3, 128, 128) and len(captions) == 8 and same.shape == (8, 8)
    assert images.min() > -1.5 and images.max() < 1.5


def test_blur_is_that_of_a_gaussian():
    scipy = pytest.importorskip("scipy.ndimage")
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(1)
    sigma = float(np.float32(np.random.default_rng(1).uniform(0.2, 1.5, 1)[0]))

    class Quiet:
        def __getattr__(self, name):
            return getattr(rng, name)

        def uniform(self, low, high, size):
            return rng.uniform(low, high, size) if low else np.zeros(size)  # no noise

    got = degrade(picture, Quiet())
    want = scipy.gaussian_filter(picture.numpy(), (0, 0, sigma, sigma), mode="nearest", radius=(0, 0, 4, 4))
    np.testing.assert_allclose(got.numpy(), want, atol=1e-5)


def test_a_broken_picture_costs_the_caption_that_prefers_it():
    torch.manual_seed(0)
    clip = build_clip(32).eval()
    images, ids = torch.randn(3, 3, 128, 128), torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])
    mask, same = torch.ones_like(ids), torch.eye(2)
    with torch.no_grad():
        loss, _ = ContrastiveLoss(clip)(images, ids, mask, same)
        logits = clip(input_ids=ids, attention_mask=mask, pixel_values=images).logits_per_text
    of_captions = -torch.log_softmax(logits, 1).diagonal().mean()
    of_pictures = -torch.log_softmax(logits[:, :2].t(), 1).diagonal().mean()
    torch.testing.assert_close(loss, 0.5 * (of_captions + of_pictures))
