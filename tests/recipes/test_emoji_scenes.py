"""The renderer of EmojiScenes: its captions, its layouts and its speed."""

import time

import numpy as np
import pytest

from trimtab.recipes.emoji_scenes import (
    BACKGROUNDS,
    CANVAS,
    CATEGORIES,
    COLOURS,
    OBJECTS,
    Scene,
    SceneFacts,
    SceneObject,
    alter_facts,
    alterable_attributes,
    caption_words,
    parse_caption,
    relation_of,
    sample_facts,
    sample_scene,
    write_caption,
)


def every_kind_of_facts() -> list[SceneFacts]:
    names = list(OBJECTS)
    facts = [SceneFacts((name,), count, None, "sky") for name in names for count in (1, 2, 3, 4)]
    facts += [SceneFacts(("cat",), 1, None, background) for background in BACKGROUNDS]
    pairs = [(first, second) for first in names for second in names if first != second]
    return facts + [
        SceneFacts(pair, 1, relation, "night")
        for index, pair in enumerate(pairs)
        for relation in (("left", "right", "above", "below")[index % 4],)
    ]


def test_vocabulary_has_what_is_promised() -> None:
    assert sum(kind.colour is None for kind in OBJECTS.values()) >= 30
    assert {kind.noun for kind in OBJECTS.values() if kind.colour} == {"circle", "square", "heart"}
    assert len(COLOURS) == 8 and len(BACKGROUNDS) == 8


def test_captions_parse_back() -> None:
    words = set(caption_words())
    for facts in every_kind_of_facts():
        caption = write_caption(facts)
        assert parse_caption(caption) == facts
        assert set(caption.split()) <= words


def test_captions_of_different_facts_differ() -> None:
    captions = [write_caption(facts) for facts in every_kind_of_facts()]
    assert len(set(captions)) == len(set(every_kind_of_facts()))


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "a cat on a turquoise background",
        "a zebra on a sky background",
        "five cats on a sky background",
        "two cats to the left of an owl on a sky background",
        "a cat beside an owl on a sky background",
    ],
)
def test_captions_outside_the_grammar_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="caption must"):
        parse_caption(caption)


def test_held_out_facts_are_a_tenth_and_never_train() -> None:
    rng = np.random.default_rng(0)
    every = [sample_facts(rng) for _ in range(4000)]
    assert 0.08 < np.mean([facts.is_held_out() for facts in every]) < 0.125
    assert all(facts.is_held_out() == facts.seen_from_second().is_held_out() for facts in every)
    held_out = {write_caption(sample_facts(rng, held_out=True)) for _ in range(1000)}
    training = {write_caption(sample_facts(rng, held_out=False)) for _ in range(4000)}
    assert not held_out & training


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("grid", [1, 8, 16])
def test_layouts(category: str, grid: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(250):
        facts = sample_facts(rng, category)
        scene = sample_scene(rng, facts, grid=grid)
        assert scene.facts == facts and facts.category == category
        assert parse_caption(scene.caption) == facts
        assert abs(scene.gradient) <= 0.06
        for item in scene.objects:
            left, top, size = item.box
            assert 0 <= left <= CANVAS - size and 0 <= top <= CANVAS - size
            assert left % grid == 0 and top % grid == 0
        for index, first in enumerate(scene.objects):
            for second in scene.objects[:index]:
                pairs = zip(first.centre, second.centre, strict=True)
                gaps = [abs(a - b) - (first.box[2] + second.box[2]) / 2 for a, b in pairs]
                assert max(gaps) >= 0
        if facts.relation is not None:
            across, down = (a - b for a, b in zip(scene.objects[0].centre, scene.objects[1].centre, strict=True))
            drawn = {"left": -across, "right": across, "above": -down, "below": down}
            assert max(drawn, key=drawn.get) == facts.relation == relation_of(*scene.objects)


def test_the_same_seed_gives_the_same_pictures() -> None:
    def draw(seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [sample_scene(rng).render() for _ in range(20)]

    assert all(np.array_equal(first, second) for first, second in zip(draw(3), draw(3), strict=True))
    assert not all(np.array_equal(first, second) for first, second in zip(draw(3), draw(4), strict=True))


@pytest.mark.parametrize("size", [64, 96, 128, 192])
def test_sizes_show_the_same_scene(size: int) -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        scene = sample_scene(rng)
        picture = scene.render(size)
        assert picture.shape == (size, size, 3) and picture.dtype == np.float32
        assert picture.min() >= 0.0 and picture.max() <= 1.0
        assert scene.to_image(size).size == (size, size)
        cells = [scene.render(n).reshape(16, n // 16, 16, n // 16, 3).mean((1, 3)) for n in (size, 128)]
        assert np.abs(cells[0] - cells[1]).mean() < 0.02


def test_a_size_below_64_is_refused() -> None:
    with pytest.raises(ValueError, match="size must be at least 64"):
        Scene((SceneObject("cat", (32, 32, 64)),), "sky").render(63)


def test_the_ground_is_the_palette_and_objects_stay_in_their_boxes() -> None:
    scene = Scene((SceneObject("cat", (40, 40, 48)),), "pink")
    outside = np.ones((128, 128), bool)
    outside[40:88, 40:88] = False
    assert np.allclose(scene.render()[outside] * 255.0, BACKGROUNDS["pink"], atol=1e-3)
    assert np.abs(scene.render()[~outside] * 255.0 - BACKGROUNDS["pink"]).max() > 100


def test_alterations_change_one_attribute() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        facts = sample_facts(rng)
        for attribute in alterable_attributes(facts):
            altered = alter_facts(facts, rng, attribute)
            changed = {name for name in ("objects", "count", "relation", "background")
                       if getattr(facts, name) != getattr(altered, name)}  # fmt: skip
            assert changed == {{"object": "objects", "colour": "objects"}.get(attribute, attribute)}
            assert parse_caption(write_caption(altered)) == altered


def test_a_thousand_scenes_a_second() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):  # fills the cache of resized sprites
        sample_scene(rng).render()
    rates = []
    for _ in range(8):
        started = time.process_time()
        for _ in range(100):
            sample_scene(rng).render()
        rates.append(100 / (time.process_time() - started))
    assert max(rates) >= 1000
