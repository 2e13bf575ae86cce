"""Functions as rewards, weighted sums, resizing, and what is refused."""

import math

import numpy as np
import ot
import pytest
import torch
from PIL import Image

from trimtab.rewards import (
    CallableReward,
    ImageSimilarityReward,
    PaletteReward,
    Preprocessing,
    WeightedReward,
    center_crop,
    resize,
)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@pytest.fixture
def images():
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_function_is_a_reward(images):
    reward = CallableReward(brightness, differentiable=True)
    assert reward.name == "brightness" and reward.differentiable
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, "a cat").sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 1 / 192))
    seen = []
    flat = CallableReward(lambda pictures, prompts: seen.append((pictures, prompts)) or [1, 2, 3], name="flat")
    values = flat(x, ["a", "b", "c"])
    assert values.tolist() == [1.0, 2.0, 3.0] and not values.requires_grad and not flat.differentiable
    assert not seen[0][0].requires_grad and seen[0][1] == ["a", "b", "c"]
    for kind in (np.array, torch.tensor, tuple):
        assert CallableReward(lambda *_, kind=kind: kind([1.0, 2.0, 3.0]))(images, "a").tolist() == [1.0, 2.0, 3.0]


def test_a_weighted_sum_reports_its_terms(images):
    bright, red = CallableReward(brightness, True), CallableReward(redness, True)
    off = CallableReward(lambda pictures, prompts: pictures.square().mean((1, 2, 3)), True, name="off")
    reward = WeightedReward([(bright, 2.0), (red, -0.5), (off, 0.0)])
    x = images.clone().requires_grad_()
    value, terms = reward(x, "a cat", return_terms=True)
    torch.testing.assert_close(value, 2 * brightness(images, "") - 0.5 * redness(images, ""))
    assert list(terms) == ["brightness", "redness", "off"] and not any(term.requires_grad for term in terms.values())
    (gradient,) = torch.autograd.grad(value.sum(), x)
    parts = torch.full((3, 8, 8), 2 / 192) - 0.5 * torch.tensor([1 / 64, -1 / 128, -1 / 128]).view(3, 1, 1)
    torch.testing.assert_close(gradient, parts.expand_as(gradient))
    plain = CallableReward(lambda *_: [0.0] * 3, name="plain")
    assert not WeightedReward([(bright, 1.0), (plain, 1.0)]).differentiable
    assert WeightedReward([(bright, 1.0), (plain, 0.0)]).differentiable  # it takes no part


@pytest.mark.parametrize(
    ("rewards", "error", "words"),
    [
        ([], ValueError, "takes at least one > 0"),
        ([(CallableReward(brightness), 0.0), (CallableReward(redness), -1.0)], ValueError, "at least one > 0"),
        ([(CallableReward(brightness), math.nan)], ValueError, "takes finite numbers"),
        ([(CallableReward(brightness), "1")], ValueError, "takes finite numbers"),
        ([(brightness, 1.0)], TypeError, "has a function"),
        ([(CallableReward(brightness), 1.0)] * 2, ValueError, "takes names that differ"),
        ({"bundeld": 1.0}, ValueError, "takes bundled"),
    ],
)
def test_weights_that_make_no_sum(rewards, error, words):
    with pytest.raises(error, match=words):
        WeightedReward(rewards)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda images, prompts: images, r"returned shape \(3, 3, 8, 8\); takes a tensor of shape \(3,\)"),
        (lambda images, prompts: images.mean(), r"returned shape \(\)"),
        (lambda images, prompts: [0.5], r"returned shape \(1,\)"),
        (lambda images, prompts: 0.5, "returned a float"),
        (lambda images, prompts: None, "returned a NoneType"),
    ],
)
def test_a_reward_of_another_shape(function, words, images):
    with pytest.raises(ValueError, match=words):
        CallableReward(function, name="odd")(images, "a cat")


def test_what_a_reward_takes(images):
    reward = CallableReward(brightness)
    for pictures, prompts, error, words in (
        (images[0], "a", ValueError, r"shape \(3, 8, 8\); takes \(B, 3, H, W\)"),
        (images[:0], "a", ValueError, "with B >= 1"),
        (images[:, :1], "a", ValueError, r"shape \(3, 1, 8, 8\)"),
        (images.mul(255).byte(), "a", TypeError, "torch.uint8; takes a floating tensor"),
        (images.numpy(), "a", TypeError, "ndarray"),
        (images, ["a", "b"], ValueError, "has 2 strings; takes one, or 3"),
        (images, 5, TypeError, "`prompts` is 5"),
        (images, ["a", "b", 3], TypeError, "takes a string or a list of strings"),
    ):
        with pytest.raises(error, match=words):
            reward(pictures, prompts)
    with pytest.raises(TypeError, match="`function` is a str"):
        CallableReward("brightness")
    with pytest.raises(TypeError, match="`reference` is a str"):
        ImageSimilarityReward(torch.nn.Linear(1, 1), Preprocessing(), "cat.png")


def smooth_picture(height, width):
    """A picture without pixels near black or white, where PIL would clip the overshoot."""
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    waves = torch.stack([(x * y / 3).sin(), (x + 2 * y).cos(), (3 * x).sin() * y.cos()])
    return (0.5 + 0.25 * waves)[None]


@pytest.mark.parametrize(("height", "width"), [(300, 500), (640, 260), (100, 150)])
def test_resizing_is_pils_bicubic(height, width):
    """The shorter side becomes 224, the longer is rounded down; up and down, antialiased where it gets smaller."""
    image = smooth_picture(height, width)
    bands = [Image.fromarray(band.numpy(), mode="F") for band in image[0]]
    ours = resize(image, 224)
    size = (224 * width // height, 224) if height < width else (224, 224 * height // width)
    expected = torch.from_numpy(np.stack([np.asarray(band.resize(size, Image.BICUBIC)) for band in bands]))
    assert ours.shape[2:] == expected.shape[1:]
    torch.testing.assert_close(ours[0], expected, rtol=0, atol=2e-3)


def test_preprocessing_of_300_by_500_is_the_crop_by_hand():
    """Width 500 * 224 / 300 = 373.3, rounded down to 373; (373 - 224) / 2 = 74.5, rounded down to 74 at the left."""
    image = smooth_picture(300, 500)
    by_hand = torch.nn.functional.interpolate(image, (224, 373), mode="bicubic", antialias=True)[..., 74:298]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    torch.testing.assert_close(Preprocessing()(image), (by_hand - mean) / std)
    x = image.clone().requires_grad_()
    Preprocessing()(x).square().sum().backward()
    assert (x.grad[..., 120:380] != 0).any() and (x.grad[..., :80] == 0).all()  # what is cropped has no part


def test_pictures_smaller_than_the_crop_get_a_border():
    assert center_crop(torch.ones(1, 1, 1, 3), (2, 2)).tolist() == [[[[1, 1], [0, 0]]]]


def test_configs_are_read_as_transformers_means_them():
    config = {"size": {"height": 10, "width": 20}, "resample": 2, "do_normalize": False}
    assert Preprocessing.from_config(config) == Preprocessing((10, 20), None, (0.0,) * 3, (1.0,) * 3, "bilinear")
    assert Preprocessing.from_config({"size": 7, "do_resize": False}).size is None
    assert Preprocessing.from_config({"size": 7}).size == 7
    with pytest.raises(ValueError, match="takes shortest_edge, or height and width"):
        Preprocessing.from_config({"size": {"longest_edge": 10}})


# ---- palettes ----------------------------------------------------------------------------------------------


def test_palette_of_one_colour_is_its_distance():
    """SW_2 of two points is |a - b| times the root mean square of the directions' share of it: sqrt(1/3) for many."""
    picture = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    colour = (0.6, 0.5, 0.2)
    reward = PaletteReward([colour], num_projections=20000)
    expected = math.dist((0.2, 0.5, 0.9), colour) / math.sqrt(3)
    assert reward(picture, "").item() == pytest.approx(-expected, rel=0.02)


def test_palette_is_pots_distance():
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reward = PaletteReward(["red", "#00ff00", (0.1, 0.2, 0.3)], weights=[1, 2, 1], size=16, num_projections=50)
    pixels = picture[0].flatten(1).T.double().numpy()
    palette = np.array([[1, 0, 0], [0, 1, 0], [0.1, 0.2, 0.3]])
    expected = ot.sliced_wasserstein_distance(
        pixels, palette, b=np.array([0.25, 0.5, 0.25]), projections=reward.directions.double().numpy().T, p=2
    )
    assert reward(picture, "").item() == pytest.approx(-expected, abs=1e-4)


def test_palette_can_be_climbed_and_read_off_a_picture():
    target = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(1)) * 0.3
    reward = PaletteReward(target, size=12)
    picture = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(2)).requires_grad_()
    optimizer = torch.optim.Adam([picture], lr=0.02)
    first = reward(picture, "").detach()
    for _ in range(60):
        optimizer.zero_grad()
        (-reward(picture, "").sum()).backward()
        optimizer.step()
    assert (reward(picture, "") > first / 5).all()
    array = (target.movedim(0, 2) * 255).round().byte().numpy()
    same = PaletteReward(Image.fromarray(array), size=12)(picture, "")
    torch.testing.assert_close(same, reward(picture, ""), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("palette", "options", "error", "words"),
    [
        ("red", {}, TypeError, "`palette` is 'red'; takes a list"),
        ([], {}, TypeError, "takes a list of colours"),
        (["reddish"], {}, ValueError, "has 'reddish'"),
        ([(1, 2, 3)], {}, ValueError, r"three numbers in \[0, 1\]"),
        (torch.rand(1, 3, 4, 4), {}, ValueError, r"shape \(1, 3, 4, 4\)"),
        (["red"], {"weights": [1, 2]}, ValueError, "takes 1 numbers"),
        (["red"], {"weights": [0]}, ValueError, "not all 0"),
        (torch.rand(3, 4, 4), {"weights": [1]}, ValueError, "a picture has its own"),
    ],
)
def test_palettes_that_are_none(palette, options, error, words):
    with pytest.raises(error, match=words):
        PaletteReward(palette, **options)
