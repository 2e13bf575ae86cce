"""The judge of pictures: what it must call right, and what it must not."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from trimtab.assets import asset_path
from trimtab.recipes.emoji_scenes import (
    ATTRIBUTES,
    CATEGORIES,
    OBJECTS,
    Scene,
    SceneObject,
    Verdict,
    alter_facts,
    alterable_attributes,
    check_scene,
    sample_scene,
    summarize,
    write_caption,
)
from trimtab.recipes.emoji_scenes.scene import background_rows, sprite


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def held_out(grid: int = 1, size: int = 128, count: int = 60) -> tuple[list[Scene], torch.Tensor]:
    rng = np.random.default_rng(11)
    scenes = [sample_scene(rng, category=CATEGORIES[i % 4], held_out=True, grid=grid) for i in range(count)]
    return scenes, to_images([scene.render(size) for scene in scenes])


def to_images(pictures: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures).astype(np.float32)).permute(0, 3, 1, 2)


def captions(scenes: list[Scene]) -> list[str]:
    return [scene.caption for scene in scenes]


def share(verdicts: list[Verdict]) -> float:
    return summarize(verdicts)["overall"]


@pytest.mark.parametrize(("grid", "size"), [(8, 128), (1, 128), (1, 96), (1, 64)])
def test_renders_are_right(grid: int, size: int) -> None:
    scenes, images = held_out(grid, size, 60 if size == 128 else 24)
    verdicts = check_scene(images, captions(scenes))
    assert share(verdicts) >= (0.99 if size == 128 else 0.95)
    for scene, verdict in zip(scenes, verdicts, strict=True):
        if verdict.correct:
            found = {(item.name, item.box) for item in verdict.objects}
            for item in scene.objects:
                assert any(
                    name == item.name and max(abs(a - b) for a, b in zip(box, item.box, strict=True)) <= 4
                    for name, box in found
                )


def test_blurred_and_noisy_pictures_are_right() -> None:
    scenes, images = held_out()
    rng = np.random.default_rng(0)
    pictures = [gaussian_filter(picture, (1.3, 1.3, 0)) for picture in images.permute(0, 2, 3, 1).numpy()]
    pictures = [np.clip(picture + rng.normal(0.0, 0.03, picture.shape), 0.0, 1.0) for picture in pictures]
    assert share(check_scene(to_images(pictures), captions(scenes))) >= 0.97


@torch.no_grad()
def test_pictures_through_the_bundled_autoencoder_are_right() -> None:
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL.from_pretrained(asset_path("emoji-scenes") / "vae", dtype=torch.float32)
    scenes, images = held_out()
    decoded = [
        autoencoder.decode(autoencoder.encode(part * 2.0 - 1.0).latent_dist.mode()).sample for part in images.split(12)
    ]
    images = (torch.cat(decoded) / 2.0 + 0.5).clamp(0.0, 1.0)
    assert share(check_scene(images, captions(scenes))) >= 0.97
    assert wrong_but_accepted(scenes, images, ATTRIBUTES) <= 0.03


def wrong_but_accepted(scenes: list[Scene], images: torch.Tensor, attributes: tuple[str, ...]) -> float:
    rng = np.random.default_rng(4)
    pairs = [
        (image, write_caption(alter_facts(scene.facts, rng, attribute)))
        for scene, image in zip(scenes, images, strict=True)
        for attribute in [str(rng.choice([name for name in alterable_attributes(scene.facts) if name in attributes]))]
    ]
    verdicts = check_scene(torch.stack([image for image, _ in pairs]), [caption for _, caption in pairs])
    return sum(verdict.correct for verdict in verdicts) / len(verdicts)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_captions_wrong_in_one_attribute_are_rejected(attribute: str) -> None:
    scenes, images = held_out()
    kept = [index for index, scene in enumerate(scenes) if attribute in alterable_attributes(scene.facts)][:16]
    assert len(kept) == 16
    assert wrong_but_accepted([scenes[index] for index in kept], images[kept], (attribute,)) == 0.0


def one_object(rng: np.random.Generator) -> tuple[Scene, np.ndarray]:
    scene = sample_scene(rng, category="one")
    return scene, np.broadcast_to(background_rows(scene.background, scene.gradient, 128), (128, 128, 3)).clip(0, 1)


def other_than(rng: np.random.Generator, name: str) -> str:
    return str(rng.choice([other for other in OBJECTS if other != name]))


def lay(ground: np.ndarray, colour: np.ndarray, opacity: np.ndarray, box: tuple[int, int, int]) -> np.ndarray:
    left, top, size = box
    picture = ground.copy()
    window = picture[top : top + size, left : left + size]
    window[:] = (window * (1.0 - opacity) + colour).clip(0.0, 1.0)
    return picture


def blob(rng: np.random.Generator) -> tuple[Scene, np.ndarray]:
    scene, ground = one_object(rng)
    left, top, size = scene.objects[0].box
    y, x = np.mgrid[:128, :128]
    opacity = np.exp(-(np.hypot(x - left - size / 2, y - top - size / 2)[..., None] ** 2) / (0.3 * size) ** 2)
    return scene, ground * (1.0 - opacity) + rng.random(3) * opacity


def halves(rng: np.random.Generator) -> tuple[Scene, np.ndarray]:
    scene, ground = one_object(rng)
    box = scene.objects[0].box
    colour, opacity = (layer.copy() for layer in sprite(scene.objects[0].name, box[2]))
    second = sprite(other_than(rng, scene.objects[0].name), box[2])
    colour[box[2] // 2 :], opacity[box[2] // 2 :] = (layer[box[2] // 2 :] for layer in second)
    return scene, lay(ground, colour, opacity, box)


def blend(rng: np.random.Generator) -> tuple[Scene, np.ndarray]:
    scene, ground = one_object(rng)
    name, box = scene.objects[0].name, scene.objects[0].box
    pairs = zip(sprite(name, box[2]), sprite(other_than(rng, name), box[2]), strict=True)
    return scene, lay(ground, *((first + second) / 2.0 for first, second in pairs), box)


def halfway_colour(rng: np.random.Generator) -> tuple[Scene, np.ndarray]:
    scene, ground = one_object(rng)
    colours = (("yellow", "orange"), ("blue", "purple"))[rng.integers(2)]
    first, second = (f"{colour} circle" for colour in rng.permutation(colours))
    pairs = zip(sprite(first, 64), sprite(second, 64), strict=True)
    picture = lay(ground, *((one + other) / 2.0 for one, other in pairs), (32, 32, 64))
    return Scene((SceneObject(first, (32, 32, 64)),), scene.background, scene.gradient), picture


def upper_half_missing(rng: np.random.Generator) -> tuple[Scene, np.ndarray]:
    scene, ground = one_object(rng)
    left, top, size = scene.objects[0].box
    picture = scene.render()
    picture[top : top + size // 2] = ground[top : top + size // 2]
    return scene, picture


def empty(rng: np.random.Generator) -> tuple[Scene, np.ndarray]:
    return one_object(rng)


def noise(rng: np.random.Generator) -> tuple[Scene, np.ndarray]:
    scene, _ = one_object(rng)
    picture = gaussian_filter(rng.normal(size=(128, 128, 3)), (5, 5, 0))
    return scene, (0.5 + 0.25 * picture / picture.std()).clip(0.0, 1.0)


def another_object(rng: np.random.Generator) -> tuple[Scene, np.ndarray]:
    scene = Scene((SceneObject("cat", (0, 40, 48)),), "sky")
    return scene, Scene((*scene.objects, SceneObject(other_than(rng, "cat"), (72, 40, 48))), "sky").render()


WRONG = [blob, halves, blend, halfway_colour, upper_half_missing, empty, noise, another_object]


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_what_is_not_the_caption_is_rejected(make) -> None:
    rng = np.random.default_rng(9)
    cases = [make(rng) for _ in range(40)]
    verdicts = check_scene(to_images([picture for _, picture in cases]), captions([scene for scene, _ in cases]))
    # The lower half of a heart is nearly a smaller heart, which passes where the ground is near its colour.
    allowed = 0.1 if make is upper_half_missing else 0.05
    assert sum(verdict.correct for verdict in verdicts) <= allowed * len(cases)


def test_a_verdict_says_what_is_wrong() -> None:
    scene = Scene((SceneObject("cat", (8, 40, 48)), SceneObject("red heart", (72, 32, 56))), "sky")
    stated = {
        "a cat to the left of a red heart on a sky background": set(),
        "a cat to the left of a red heart on a pink background": {"background_right"},
        "a cat to the left of a blue heart on a sky background": {"colour_right", "relation_right"},
        "a dog to the left of a red heart on a sky background": {"objects_right", "relation_right"},
        "a cat to the right of a red heart on a sky background": {"relation_right"},
        "a cat on a sky background": {"objects_right", "count_right"},
    }
    fields = ("background_right", "objects_right", "colour_right", "count_right", "relation_right", "clean")
    for verdict, wrong in zip(
        check_scene([scene.to_image()] * len(stated), list(stated)), stated.values(), strict=True
    ):
        assert {name for name in fields if getattr(verdict, name) is False} == wrong
        assert verdict.correct == (not wrong) == (verdict.right_share == 1)


def test_the_share_that_is_right_counts_every_object() -> None:
    scene = Scene((SceneObject("cat", (8, 40, 48)), SceneObject("red heart", (72, 32, 56))), "sky")
    stated = {
        "a cat to the left of a red heart on a pink background": 5 / 6,
        "a cat to the left of a blue heart on a sky background": 4 / 6,
        "a dog to the right of a blue heart on a pink background": 2 / 6,
        "a cat on a sky background": 3 / 4,
        "three cats on a sky background": 3 / 6,
    }
    verdicts = check_scene([scene.to_image()] * len(stated), list(stated))
    assert [verdict.right_share for verdict in verdicts] == pytest.approx(list(stated.values()))


def test_a_batch_gives_what_its_pictures_give_and_pil_what_tensors_give() -> None:
    scenes, images = held_out(count=60)
    words = captions(scenes[:6])
    together = check_scene(images[:6], words)
    alone = [check_scene(image[None], caption)[0] for image, caption in zip(images[:6], words, strict=True)]
    pil = check_scene([scene.to_image() for scene in scenes[:6]], words)
    for first, second, third in zip(together, alone, pil, strict=True):
        boxes = [[(item.name, item.box) for item in verdict.objects] for verdict in (first, second, third)]
        assert boxes[0] == boxes[1] == boxes[2]
        assert first.correct == second.correct == third.correct


def test_summary_counts_by_category() -> None:
    scenes, images = held_out(8)
    verdicts = check_scene(images[:8], captions(scenes[:8]))
    assert summarize(verdicts) == dict.fromkeys(
        ("background", "one object", "two objects", "left/right", "above/below", "counts", "colour", "overall"), 1.0
    )
    assert "counts" not in summarize([verdicts[0]])
    wrong = check_scene(images[:4], ["a cat on a night background"] * 4)
    assert summarize(wrong)["overall"] == 0.0
    with pytest.raises(ValueError, match="verdicts must"):
        summarize([])


@pytest.mark.parametrize(
    ("images", "caption", "message"),
    [
        (torch.zeros(2, 3, 64, 64), ["a cat on a sky background"], "captions must be one for each"),
        (torch.zeros(1, 3, 64, 96), "a cat on a sky background", "images must be square"),
        (torch.zeros(1, 1, 64, 64), "a cat on a sky background", "images must be a float tensor"),
        (torch.full((1, 3, 64, 64), 255.0), "a cat on a sky background", "images must lie in"),
        (torch.full((1, 3, 64, 64), torch.nan), "a cat on a sky background", "images must lie in"),
        (torch.zeros(1, 3, 64, 64), "a zebra on a sky background", "caption must"),
        (
            [Image.new("RGB", (64, 64)), Image.new("RGB", (96, 96))],
            "a cat on a sky background",
            "images must be of one",
        ),
    ],
)
def test_bad_input_names_the_argument(images, caption, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_scene(images, caption)


def test_other_things_than_pictures_are_refused() -> None:
    with pytest.raises(TypeError, match="images must be a tensor or PIL"):
        check_scene([np.zeros((64, 64, 3))], "a cat on a sky background")
