"""The prompt against its alternatives, against transformers' own logits."""

import pytest
import torch

from tests.rewards import models
from trimtab.recipes.emoji_scenes import altered_captions, parse_caption
from trimtab.rewards import CallableReward, ContrastReward, load_reward

OTHERS = {
    "a red cat": ["a dog", "two dog on a sky background"],
    "a dog": ["a red cat"],
}


def pictures(side=models.SIDE):
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_it_is_the_log_probability_of_clips_classifier(tmp_path):
    clip = load_reward(models.saved(models.clip(), tmp_path))
    reward = ContrastReward(clip, OTHERS.__getitem__)
    images, prompts = pictures(), list(OTHERS)
    for row, prompt in enumerate(prompts):
        # CLIPReward's own values are tested against transformers.
        logits = torch.cat([clip(images[row : row + 1], text) for text in (prompt, *OTHERS[prompt])])
        expected = torch.softmax(logits.double(), 0)[0].log().float()
        torch.testing.assert_close(reward(images, prompts)[row], expected, rtol=0.0, atol=1e-5)
    assert (reward(images, prompts) < 0).all()


def test_its_gradient_is_a_finite_differences(tmp_path):
    reward = ContrastReward(load_reward(models.saved(models.clip(), tmp_path)), OTHERS.__getitem__)
    x, prompts = pictures().requires_grad_(), list(OTHERS)
    (gradient,) = torch.autograd.grad(reward(x, prompts).sum(), x)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ends = [reward(x + sign * 1e-2 * direction, prompts).sum() for sign in (1, -1)]
    assert float((ends[0] - ends[1]) / 2e-2) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_bad_input_is_named(tmp_path):
    clip = load_reward(models.saved(models.clip(), tmp_path))
    with pytest.raises(TypeError, match="`reward` is a CallableReward; takes a CLIPReward"):
        ContrastReward(CallableReward(lambda images, prompts: images.mean((1, 2, 3))), OTHERS.__getitem__)
    with pytest.raises(TypeError, match="`alternatives` is a list; takes a function of a prompt"):
        ContrastReward(clip, ["a dog"])
    with pytest.raises(ValueError, match="gave no text for 'a dog'; takes at least one"):
        ContrastReward(clip, lambda prompt: [])(pictures(), "a dog")


@pytest.mark.parametrize(
    "caption",
    [
        "three owls on a pink background",
        "an apple on a sky background",
        "a red circle above a cat on a gray background",
        "a green heart to the left of a red heart on a night background",
    ],
)
def test_altered_captions_differ_in_one_attribute(caption):
    facts, others = parse_caption(caption), [parse_caption(text) for text in altered_captions(caption)]
    assert len(others) == len(set(others)) and facts not in others
    for other in others:
        changed = [name for name in ("count", "relation", "background") if getattr(facts, name) != getattr(other, name)]
        objects = sum(a != b for a, b in zip(facts.objects, other.objects, strict=True))
        assert len(changed) + objects == 1
        assert len(set(other.objects)) == len(other.objects)
    if facts.relation is None:
        assert {other.count for other in others} == {1, 2, 3, 4}
    else:
        assert facts.seen_from_second().relation in {other.relation for other in others}
