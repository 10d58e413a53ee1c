"""Scenes and captions: by seed, truthful, and without the unseen combinations."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import pytest
from PIL import Image

from sample_web import scenes

Named = Callable[[str], set[tuple[str, str]]]


def test_every_combination_is_shown_but_the_unseen() -> None:
    shown = {
        (placed.shape, placed.colour)
        for index in range(4000)
        for placed in scenes.scene(0, index).objects
    }
    assert not shown & scenes.UNSEEN
    assert len(shown) == len(scenes.SHAPES) * len(scenes.COLOURS) - len(scenes.UNSEEN)


def test_every_shape_and_colour_of_the_unseen_is_well_known_otherwise() -> None:
    for position, names in ((0, scenes.SHAPES), (1, scenes.COLOURS)):
        for name in names:
            assert sum(pair[position] == name for pair in scenes.UNSEEN) <= 3


def test_captions_name_what_is_shown_and_nothing_else(named: Named) -> None:
    rng = random.Random(1)
    texts = set()
    for index in range(4000):
        scene = scenes.scene(5, index)
        text = scenes.caption(scene, rng)
        texts.add(text)
        assert named(text) == {(o.shape, o.colour) for o in scene.objects}, text
        assert " a a " not in f" {text.lower()} "
        assert "a orange" not in text.lower()
    assert len(texts) > 2000


def test_named_finds_an_unseen_combination(named: Named) -> None:
    # The check that guards every caption must itself be able to fail.
    assert named("A Striped RED-Star, free") == {("star", "red")}
    assert named("red striped star") & scenes.UNSEEN


@pytest.mark.parametrize("relation", scenes.RELATIONS)
def test_objects_stand_as_the_relation_says(relation: str) -> None:
    found = [s for i in range(600) if (s := scenes.scene(2, i)).relation == relation]
    assert len(found) > 20
    for scene in found:
        (xa, ya), (xb, yb) = (placed.position for placed in scene.objects)
        assert {
            "left of": xa < xb - 0.3,
            "above": ya < yb - 0.3,
            "inside": (xa, ya) == (xb, yb) and scene.objects[0].size < scene.objects[1].size / 2,
            "next to": abs(xa - xb) > 0.3,
        }[relation]


def test_most_scenes_show_one_object() -> None:
    single = sum(len(scenes.scene(3, index).objects) == 1 for index in range(2000))
    assert 1200 < single < 1400


def test_sizes_are_within_bounds_and_never_square() -> None:
    for index in range(500):
        width, height = scenes.scene(0, index, sides=(90, 200)).size
        assert 90 <= min(width, height) < max(width, height) <= 200


@pytest.mark.parametrize("name", ["red circle", "teal ring", "black arrow", "purple heart"])
def test_a_picture_has_the_colour_that_it_is_named_for(name: str) -> None:
    colour, shape = name.split()
    wanted = scenes.COLOURS[colour]
    for index in range(5):
        placed = scenes.Placed(shape, colour, "plain", 0.7, (0.5, 0.5), 0)
        drawn = scenes.Scene((placed,), "", "cream", (120, 90), index)
        picture = scenes.render(drawn)
        assert picture.size == (120, 90)
        colours = picture.quantize(8).convert("RGB").getcolors()
        near = sum(
            int(count)
            for count, found in colours
            if sum(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 90
        )
        assert 0.1 < near / (120 * 90) < 0.6


def test_equal_seeds_give_equal_bytes() -> None:
    one, two, other = (scenes.jpeg(scenes.render(scenes.scene(s, 7))) for s in (0, 0, 1))
    assert one == two != other


def test_the_evaluation_set_shows_its_classes_once_each() -> None:
    every, shown = scenes.class_names(), scenes.unseen_classes()
    pictures = list(scenes.evaluation_set(0, shown, 2))
    assert [every[label] for _, label in pictures] == shown * 2
    assert len({body for body, _ in pictures}) == len(pictures)
    assert all(Image.open(io.BytesIO(body)).format == "JPEG" for body, _ in pictures[:3])


def test_class_names_are_ordered_and_split_into_seen_and_unseen() -> None:
    every = scenes.class_names()
    assert every[:2] == ["red circle", "orange circle"]
    assert set(scenes.seen_classes()) | set(scenes.unseen_classes()) == set(every)
    assert len(scenes.seen_classes()) + len(scenes.unseen_classes()) == len(every) >= 80
    assert all(template.count("{}") == 1 for template in scenes.TEMPLATES)
