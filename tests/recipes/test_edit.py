"""Edits of scenes: what they state, and that nothing else changes."""

import numpy as np
import pytest

from trimtab.recipes.emoji_scenes import BACKGROUNDS, CANVAS, RELATIONS, Scene, SceneObject, edit, sample_scene

PAIR = Scene((SceneObject("cat", (8, 40, 48)), SceneObject("red heart", (72, 32, 56))), "sky", 0.03)


def outside(scene: Scene, names: set[str]) -> np.ndarray:
    mask = np.ones((CANVAS, CANVAS), bool)
    for item in scene.objects:
        if item.name in names:
            left, top, size = item.box
            mask[top : top + size, left : left + size] = False
    return mask


def test_replace_changes_one_box_only() -> None:
    after = edit(PAIR, replace={"cat": "dog"})
    assert after.caption == "a dog to the left of a red heart on a sky background"
    assert [item.box for item in after.objects] == [item.box for item in PAIR.objects]
    mask = outside(PAIR, {"cat"})
    assert np.array_equal(after.render()[mask], PAIR.render()[mask])
    assert not np.array_equal(after.render()[~mask], PAIR.render()[~mask])


def test_recolour_is_the_replacement_by_the_shape_of_that_colour() -> None:
    after = edit(PAIR, recolour={"red heart": "blue"})
    assert after == edit(PAIR, replace={"red heart": "blue heart"})
    mask = outside(PAIR, {"red heart"})
    assert np.array_equal(after.render()[mask], PAIR.render()[mask])


def test_two_objects_can_change_places() -> None:
    after = edit(PAIR, replace={"cat": "red heart", "red heart": "cat"})
    assert after.caption == "a red heart to the left of a cat on a sky background"


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_background_leaves_what_is_opaque(background: str) -> None:
    scene = Scene((SceneObject("black square", (32, 32, 64)),), "sky", 0.03)
    after = edit(scene, background=background)
    assert after.facts.background == background and after.gradient == scene.gradient
    assert after.objects == scene.objects
    assert np.array_equal(after.render()[48:80, 48:80], scene.render()[48:80, 48:80])


def test_mirror_states_the_opposite_relation_and_undoes_itself() -> None:
    rng = np.random.default_rng(0)
    for category in ("left_right", "above_below") * 50:
        scene = sample_scene(rng, category=category, grid=1)
        after = edit(scene, mirror=True)
        assert after.facts.objects == scene.facts.objects
        assert after.facts.relation == RELATIONS[scene.facts.relation][1]
        assert all(min(item.box[:2]) >= 0 and max(item.box[:2]) + item.box[2] <= CANVAS for item in after.objects)
        assert edit(after, mirror=True) == scene


@pytest.mark.parametrize("grid", [1, 8, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_count_keeps_boxes_and_never_overlaps(count: int, grid: int) -> None:
    rng = np.random.default_rng(count)
    kept = []
    for category in ("one", "count") * 60:
        scene = sample_scene(rng, category=category, grid=grid)
        after = edit(scene, count=count)
        assert after.facts.count == count and after.facts.objects == scene.facts.objects
        boxes = [item.box for item in after.objects]
        for index, (left, top, size) in enumerate(boxes):
            assert 0 <= left <= CANVAS - size and 0 <= top <= CANVAS - size
            for x, y, side in boxes[:index]:
                assert left + size <= x or x + side <= left or top + size <= y or y + side <= top
        before = [item.box for item in scene.objects]
        if count <= len(before):
            assert boxes == before[:count]
            mask = outside(Scene(scene.objects[count:], scene.background), set(scene.facts.objects))
            assert np.array_equal(after.render()[mask], scene.render()[mask])
        elif len(before) > 1:
            kept.append(len(set(boxes) & set(before)) / len(before))
    assert not kept or np.mean(kept) > 0.5


def test_count_adds_without_moving_where_there_is_room() -> None:
    scene = Scene((SceneObject("owl", (0, 0, 48)), SceneObject("owl", (64, 72, 48))), "mint")
    after = edit(scene, count=4)
    assert after.objects[:2] == scene.objects
    mask = outside(Scene(after.objects[2:], "mint"), {"owl"})
    assert np.array_equal(after.render()[mask], scene.render()[mask])


def test_edits_combine() -> None:
    after = edit(PAIR, replace={"cat": "owl"}, recolour={"red heart": "black"}, background="pink", mirror=True)
    assert after.caption == "an owl to the right of a black heart on a pink background"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "edit takes at least one"),
        ({"replace": {"dog": "cat"}}, "replace must name objects of the scene"),
        ({"replace": {"cat": "zebra"}}, "replace must name objects of the vocabulary"),
        ({"replace": {"cat": "red heart"}}, "replace must leave two kinds"),
        ({"recolour": {"cat": "blue"}}, "recolour must name circles, squares or hearts"),
        ({"recolour": {"red heart": "pink"}}, "recolour must give one of"),
        ({"recolour": {"blue heart": "red"}}, "recolour must name objects of the scene"),
        ({"background": "blue"}, "background must be one of"),
        ({"count": 2}, "count must be asked of a scene with one kind"),
        ({"count": 5}, "count must be a whole number from 1 to 4"),
        ({"count": True}, "count must be a whole number"),
    ],
)
def test_bad_edits_name_the_argument(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edit(PAIR, **arguments)


def test_mirror_needs_a_relation() -> None:
    with pytest.raises(ValueError, match="mirror must be asked"):
        edit(Scene((SceneObject("cat", (32, 32, 64)),), "sky"), mirror=True)
