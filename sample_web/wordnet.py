"""A small WordNet of the made-up world in the format of Princeton's database files.

`data.POS`: licence lines that begin with two blanks, then one synset a line, known by the byte
offset at which its line begins. `index.POS`: one lemma a line with the offsets of its synsets.
Format: wndb(5WN) of WordNet 3.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sample_web import scenes
from sample_web.vocabulary import ADJECTIVES, CRAFTS, EVENTS, MATERIALS, OBJECTS, PLACES, VERBS

_SUFFIX = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
_LICENCE = (
    "This small database is part of the sample web and describes a world of",
    "coloured shapes. It follows the format of the Princeton files, none of",
    "whose text it holds.",
)


@dataclass
class Synset:
    """Words for one thing, and the words above and below it."""

    lemmas: tuple[str, ...]
    gloss: str
    above: Synset | None = None
    lexicographer_file: int = 3
    below: list[Synset] = field(default_factory=list)
    offset: int = 0


def write(folder: Path) -> int:
    """Write `data.*` and `index.*` of the four parts of speech; the number of synsets."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for letter, synsets in (
        ("n", _nouns()),
        ("v", _verbs()),
        ("a", _adjectives()),
        ("r", _adverbs()),
    ):
        header = _header()
        offset = len(header)
        for synset in synsets:
            synset.offset = offset  # a line's length is the same whatever its eight-digit offsets
            offset += len(_line(synset, letter).encode())
        data = header + "".join(_line(synset, letter) for synset in synsets).encode()
        (folder / f"data.{_SUFFIX[letter]}").write_bytes(data)
        (folder / f"index.{_SUFFIX[letter]}").write_bytes(header + _index(synsets, letter))
        count += len(synsets)
    return count


def _nouns() -> list[Synset]:
    found: list[Synset] = []

    def add(lemmas: str, gloss: str, above: Synset | None = None) -> Synset:
        synset = Synset(tuple(lemmas.split()), gloss, above)
        if above:
            above.below.append(synset)
        found.append(synset)
        return synset

    entity = add("entity", "whatever there is")
    abstraction = add("abstraction abstract_entity", "what has no body", entity)
    thing = add("thing physical_entity", "what has a body", entity)
    attribute = add("attribute", "what something is like", abstraction)
    shape = add("shape form", "how the outline of something runs", attribute)
    figure = add("figure geometric_figure", "a shape that can be drawn", shape)
    colour = add("color colour coloring", "how something looks in light", attribute)
    pattern = add("pattern design figure", "a decoration that repeats", attribute)
    for name in scenes.SHAPES:
        add(f"{name} {name}_shape", f'a figure; "the {name} on the wall"', figure)
    add("lunar_crescent", "the figure of a young moon", figure)
    for name in scenes.COLOURS:
        add(f"{name} {name}ness", f"the colour of {name} paint", colour)
    for name in ("stripe", "dot", "check", "polka_dot"):
        add(name, "an element of a pattern", pattern)
    picture = add("picture image icon", "a likeness on a surface", thing)
    add("photograph photo exposure", "a picture made by light", picture)
    add("drawing", "a picture made with a pen", picture)
    add("illustration", "a picture in a book", picture)
    add("poster placard", "a picture for a wall", picture)
    add("clip_art", "pictures ready for use", picture)
    artifact = add("artifact artefact", "what somebody made", thing)
    for name in OBJECTS:
        if name != "poster":
            add(name, f'an everyday thing; "a {name} of the fair"', artifact)
    material = add("material stuff", "what things are made of", thing)
    for name in MATERIALS:
        add(name, "a material of crafts", material)
    activity = add("activity", "what people do", abstraction)
    for name in (*CRAFTS, *EVENTS):
        add(name, "something that people do together", activity)
    location = add("location", "where something is", thing)
    for name in PLACES:
        add(name.title().replace(" ", "_"), "a place in the north country", location)
    background = add("background ground", "what is behind a figure", location)
    for name in scenes.BACKGROUNDS:
        add(f"{name.replace(' ', '_')}_background", "a kind of background", background)
    return found


def _verbs() -> list[Synset]:
    words = (*VERBS, "paints", "draws", "prints", "folds", "hangs")
    stems = [
        word.removesuffix("es") if word.endswith(("sses", "hes")) else word[:-1] for word in words
    ]
    return [Synset((stem,), "to do so", None, 36) for stem in stems]


def _adjectives() -> list[Synset]:
    words = (*ADJECTIVES, *scenes.PATTERNS[1:], "colorful", "hand-drawn", "left(a)")
    return [Synset((word,), "being so", None, 0) for word in (*words, *scenes.COLOURS)]


def _adverbs() -> list[Synset]:
    return [Synset((word,), "where", None, 2) for word in ("above", "below", "inside", "beside")]


def _header() -> bytes:
    return "".join(f"  {n} {text}  \n" for n, text in enumerate(_LICENCE, start=1)).encode()


def _line(synset: Synset, letter: str) -> str:
    """offset file pos words pointers [frames] | gloss"""
    words = " ".join(f"{lemma} 0" for lemma in synset.lemmas)
    pointers = [f"@ {synset.above.offset:08d} {letter} 0000"] if synset.above else []
    pointers += [f"~ {other.offset:08d} {letter} 0000" for other in synset.below]
    listed = " ".join([f"{len(pointers):03d}", *pointers])
    frames = " 01 + 08 00" if letter == "v" else ""
    head = f"{synset.offset:08d} {synset.lexicographer_file:02d} {letter} {len(synset.lemmas):02x}"
    return f"{head} {words} {listed}{frames} | {synset.gloss}  \n"


def _index(synsets: Sequence[Synset], letter: str) -> bytes:
    by_lemma: dict[str, list[Synset]] = {}
    for synset in synsets:
        for lemma in synset.lemmas:
            by_lemma.setdefault(lemma.lower().partition("(")[0], []).append(synset)
    lines = []
    for lemma, found in sorted(by_lemma.items()):
        symbols = [
            s for s, has in (("@", "above"), ("~", "below")) if any(getattr(x, has) for x in found)
        ]
        counted = " ".join([str(len(symbols)), *symbols])
        offsets = " ".join(f"{synset.offset:08d}" for synset in found)
        lines.append(f"{lemma} {letter} {len(found)} {counted} {len(found)} 0 {offsets}  \n")
    return "".join(lines).encode()
