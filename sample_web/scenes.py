"""Scenes of coloured shapes: drawn by seed, rendered as pictures, told as captions.

Some (shape, colour) combinations are kept out of every training picture and caption, so that a
model can be asked for what it has never seen.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image

from sample_web.drawing import Colour, grainy, ground, jitter, surface
from sample_web.shapes import OUTLINES, mask

SHAPES = tuple(OUTLINES)
COLOURS: dict[str, Colour] = {
    "red": (222, 28, 36),
    "orange": (250, 138, 16),
    "yellow": (252, 222, 38),
    "green": (44, 160, 58),
    "teal": (24, 200, 196),
    "blue": (36, 78, 222),
    "purple": (134, 48, 176),
    "pink": (255, 138, 196),
    "brown": (122, 70, 28),
    "black": (16, 16, 18),
}
PATTERNS = ("plain", "striped", "dotted", "checked")
RELATIONS = ("left of", "above", "inside", "next to")
BACKGROUNDS: dict[str, Colour] = {
    "white": (250, 250, 249),
    "light grey": (218, 219, 221),
    "cream": (246, 238, 214),
    "mist": (210, 224, 234),
    "grey": (150, 151, 154),
    "slate": (90, 101, 114),
    "charcoal": (50, 52, 56),
    "midnight": (24, 30, 56),
}
UNSEEN = frozenset(
    {
        ("circle", "orange"),
        ("circle", "purple"),
        ("square", "teal"),
        ("triangle", "pink"),
        ("triangle", "green"),
        ("star", "red"),
        ("cross", "yellow"),
        ("cross", "black"),
        ("ring", "blue"),
        ("diamond", "brown"),
        ("diamond", "red"),
        ("heart", "green"),
        ("crescent", "pink"),
        ("arrow", "purple"),
    }
)
"""(shape, colour) combinations that occur in no training picture or caption."""

TEMPLATES = (
    "a photo of a {}.",
    "a drawing of a {}.",
    "a picture of a {}.",
    "{}",
    "one {} on a plain background.",
    "a {}, stock image.",
    "an illustration of a {}.",
)

_SEEN = tuple((s, c) for s in SHAPES for c in COLOURS if (s, c) not in UNSEEN)
_CONTAINERS = ("circle", "square", "ring", "diamond")
_CONTRAST = 105.0  # least distance in RGB at which two paints are told apart at 64 pixels


@dataclass(frozen=True)
class Placed:
    """One object; position and size in units of the picture's central square."""

    shape: str
    colour: str
    pattern: str
    size: float
    """Side of the object's box, 0 to 1."""
    position: tuple[float, float]
    """Centre of the box (x, y), 0 to 1."""
    turn: float
    """Degrees clockwise, small."""

    @property
    def name(self) -> str:
        """`red circle`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What one picture shows."""

    objects: tuple[Placed, ...]
    relation: str
    """Of the first object to the second, one of RELATIONS; "" for a single object."""
    background: str
    size: tuple[int, int]
    """Natural (width, height), pixels."""
    grain: int
    """Seeds texture and paint jitter."""


def scene(
    seed: int, index: int, *, split: str = "train", sides: tuple[int, int] = (80, 320)
) -> Scene:
    """The scene with this number; equal arguments give equal scenes, splits never meet.

    `sides` bounds the picture's sides in pixels. No scene shows a combination of UNSEEN.
    """
    rng = random.Random(f"{split}/{seed}/{index}")
    size = _picture_size(rng, sides)
    if rng.random() < 0.65:
        shape, colour = rng.choice(_SEEN)
        return _single(rng, shape, colour, size)
    return _double(rng, size)


def single(seed: int, index: int, shape: str, colour: str, *, split: str) -> Scene:
    """A scene of exactly this object, which may be one of UNSEEN; for evaluation."""
    rng = random.Random(f"{split}/{seed}/{shape}/{colour}/{index}")
    return _single(rng, shape, colour, _picture_size(rng, (80, 320)))


def render(scene: Scene, size: int | tuple[int, int] | None = None) -> Image.Image:
    """The scene as an RGB picture of `size` (width, height) pixels; one number means a square."""
    width, height = (size, size) if isinstance(size, int) else size or scene.size
    rng = random.Random(scene.grain)
    picture = ground(rng, BACKGROUNDS[scene.background], width, height)
    square = min(width, height)
    for placed in scene.objects:
        side = max(8, round(placed.size * square))
        x = round(width / 2 + (placed.position[0] - 0.5) * square - side / 2)
        y = round(height / 2 + (placed.position[1] - 0.5) * square - side / 2)
        paint = jitter(rng, COLOURS[placed.colour], 10)
        painted = surface(rng, placed.pattern, paint, side)
        picture.paste(painted, (x, y), mask(placed.shape, side, placed.turn))
    return grainy(rng, picture)


def jpeg(picture: Image.Image, quality: int = 87) -> bytes:
    """The picture as a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def caption(scene: Scene, rng: random.Random) -> str:
    """One of many ways to say what the scene shows, mostly the whole truth, never an untruth."""
    first, *others = scene.objects
    if others:
        text = _pair_phrase(rng, first, others[0], scene.relation)
    else:
        bare = _described(rng, first)
        text = rng.choice(_SINGLE).format(bare=bare, some=f"{article(bare)} {bare}")
        if rng.random() < 0.12:
            text += f" on {_ground_phrase(scene.background, rng)}"
    if rng.random() < 0.3:
        text += rng.choice(_TAILS)
    style = rng.random()
    if style < 0.3:
        return text[0].upper() + text[1:]
    return text.title() if style < 0.36 else text


def class_names(combinations: Sequence[tuple[str, str]] | None = None) -> list[str]:
    """`colour shape` names, in the order of SHAPES and COLOURS; of all combinations by default."""
    every = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    wanted = every if combinations is None else [pair for pair in every if pair in combinations]
    return [f"{colour} {shape}" for shape, colour in wanted]


def seen_classes() -> list[str]:
    """Names of the combinations that training pictures show."""
    return class_names(_SEEN)


def unseen_classes() -> list[str]:
    """Names of the combinations that no training picture or caption has."""
    return class_names(tuple(UNSEEN))


def evaluation_set(seed: int, shown: Sequence[str], per_class: int) -> Iterator[tuple[bytes, int]]:
    """(JPEG bytes, index into `class_names()`): `per_class` single objects of each class `shown`.

    No picture is one of training.
    """
    labels = {name: label for label, name in enumerate(class_names())}
    for index in range(per_class):
        for name in shown:
            colour, shape = name.split()
            scene = single(seed, index, shape, colour, split="evaluation")
            yield jpeg(render(scene)), labels[name]


_SINGLE = (
    "{some}",
    "{bare}",
    "{bare}",
    "a photo of {some}",
    "a photo of {bare}",
    "a drawing of {some}",
    "a picture of {some}",
    "hand-drawn {bare}",
    "an illustration of {some}",
    "image of {bare}",
    "close-up of {some}",
    "look at this {bare}",
    "one {bare} for the wall",
    "a simple {bare}",
    "a poster with {some}",
    "printable {bare}",
    "sticker: {bare}",
    "a child's painting of {some}",
    "the {bare} we saw at the fair",
)
_TAILS = (
    ", stock image",
    ", vector art",
    " | Meadow Gallery",
    " - free download",
    ", clip art",
    " (print)",
    ", high quality",
    " for kids",
    "!",
    ", card no. 7",
)
_PAIRS: dict[str, tuple[str, ...]] = {
    "left of": ("{a} left of {b}", "{a} to the left of {b}", "{b} to the right of {a}"),
    "above": ("{a} above {b}", "{a} over {b}", "{b} below {a}", "{b} under {a}"),
    "inside": ("{a} inside {b}", "{a} within {b}", "{b} around {a}"),
    "next to": ("{a} next to {b}", "{a} beside {b}", "{a} and {b}", "{a} with {b}"),
}


def _described(rng: random.Random, placed: Placed) -> str:
    if placed.pattern == "plain" or rng.random() < 0.15:
        return placed.name
    if rng.random() < 0.7:
        return f"{placed.pattern} {placed.name}"
    tail = {"striped": "stripes", "dotted": "dots", "checked": "checks"}[placed.pattern]
    return f"{placed.name} with {tail}"


def article(name: str) -> str:
    """`a` or `an`."""
    return "an" if name[0] in "aeiou" else "a"


def _pair_phrase(rng: random.Random, a: Placed, b: Placed, relation: str) -> str:
    names = [_described(rng, a), _described(rng, b)]
    if rng.random() < 0.75:
        names = [f"{article(name)} {name}" for name in names]
    text = rng.choice(_PAIRS[relation]).format(a=names[0], b=names[1])
    return rng.choice(("", "", "", "a photo of ", "drawing of ", "picture: ")) + text


def _ground_phrase(background: str, rng: random.Random) -> str:
    shade = "light" if sum(BACKGROUNDS[background]) > 3 * 180 else "dark"
    return rng.choice((background, f"a {background} background", f"a {shade} background"))


def _picture_size(rng: random.Random, sides: tuple[int, int]) -> tuple[int, int]:
    low, high = sides
    short = round(low * (min(0.77 * high, 2.6 * low) / low) ** rng.random())
    long = min(high, max(short + 1, round(short * rng.uniform(1.02, 1.5))))
    return (long, short) if rng.random() < 0.6 else (short, long)


def _single(rng: random.Random, shape: str, colour: str, size: tuple[int, int]) -> Scene:
    side = rng.uniform(0.4, 0.86)
    slack = (1 - side) / 2 * 0.9
    position = (0.5 + rng.uniform(-slack, slack), 0.5 + rng.uniform(-slack, slack))
    placed = Placed(shape, colour, _pattern(rng), side, position, rng.uniform(-14, 14))
    backdrop = _background(rng, colour)
    return Scene((placed,), "", backdrop, size, rng.getrandbits(48))


def _double(rng: random.Random, size: tuple[int, int]) -> Scene:
    relation = rng.choice(RELATIONS)
    while True:
        (shape_a, colour_a), (shape_b, colour_b) = rng.choice(_SEEN), rng.choice(_SEEN)
        apart = _distance(COLOURS[colour_a], COLOURS[colour_b]) > _CONTRAST
        if apart and (relation != "inside" or shape_b in _CONTAINERS):
            break
    side_a, side_b = rng.uniform(0.34, 0.46), rng.uniform(0.34, 0.46)
    near, far = rng.uniform(0.23, 0.28), rng.uniform(0.72, 0.77)
    cross_a, cross_b = rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58)
    at_a, at_b = (near, cross_a), (far, cross_b)
    if relation == "above":
        at_a, at_b = (cross_a, near), (cross_b, far)
    elif relation == "next to" and rng.random() < 0.5:
        at_a, at_b = at_b, at_a
    elif relation == "inside":
        side_a, side_b = rng.uniform(0.3, 0.36), rng.uniform(0.82, 0.95)
        at_a, at_b = (0.5, 0.5), (0.5, 0.5)
    # Patterns on both objects of one picture blur which is which; the larger or first keeps one.
    pattern_b = "plain" if relation == "inside" else _pattern(rng)
    objects = (
        Placed(shape_a, colour_a, _pattern(rng), side_a, at_a, rng.uniform(-14, 14)),
        Placed(shape_b, colour_b, pattern_b, side_b, at_b, rng.uniform(-14, 14)),
    )
    backdrop = _background(rng, colour_a, colour_b)
    return Scene(objects, relation, backdrop, size, rng.getrandbits(48))


def _pattern(rng: random.Random) -> str:
    return rng.choice(PATTERNS[1:]) if rng.random() < 0.3 else "plain"


@cache
def _grounds(*colours: str) -> list[str]:
    """Backgrounds on which these paints stand out, the best three at least."""
    contrast = {
        name: min(_distance(shade, COLOURS[colour]) for colour in colours)
        for name, shade in BACKGROUNDS.items()
    }
    ranked = sorted(contrast, key=lambda name: -contrast[name])
    clear = [name for name in ranked if contrast[name] > _CONTRAST]
    return clear if len(clear) > 2 else ranked[:2]


def _background(rng: random.Random, *colours: str) -> str:
    return rng.choice(_grounds(*colours))


def _distance(one: Colour, other: Colour) -> float:
    return math.dist(one, other)
