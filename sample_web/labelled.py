"""A second sample web: the pictures of a labelled archive, with captions made from their classes.

For trying a whole build and training on real photographs whose classes are known.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import UserError
from sample_web import pool, site
from sample_web.pairs import Address, Cited
from sample_web.scenes import article
from sample_web.vocabulary import HOSTS, PLACES, draw, number, zipf_host

if TYPE_CHECKING:
    from sample_web.stage import SampleWebSettings

TEMPLATES = (
    "a photo of a {}.",
    "a small photo of a {}.",
    "a blurry photo of a {}.",
    "a picture of a {}.",
    "a close-up of a {}.",
    "{}",
)
OTHER_NAMES = {
    "airplane": ("plane", "aeroplane", "aircraft", "jet"),
    "automobile": ("car", "sedan", "auto"),
    "bird": ("little bird", "songbird"),
    "cat": ("kitten", "kitty"),
    "deer": ("doe", "stag", "fawn"),
    "dog": ("puppy", "hound"),
    "frog": ("tree frog", "toad"),
    "horse": ("pony", "mare"),
    "ship": ("boat", "vessel", "ferry"),
    "truck": ("lorry", "pickup truck", "fire truck"),
}
_PLURALS = {"deer": "deer", "aircraft": "aircraft", "lorry": "lorries", "pony": "ponies"}
_PLURALS |= {"puppy": "puppies", "ferry": "ferries", "kitty": "kitties"}
_FORMS = (
    "a photo of {a}",
    "{bare}",
    "{bare} at {place}",
    "photo of {a} in the wild",
    "my {bare}, summer 2014",
    "{a} near {place}",
    "look at this {bare}!",
    "close-up of {a}",
    "picture of {a} - stock photo",
    "{place}: {a} on a sunny day",
    "free {bare} picture",
    "small {bare} | {place} Gallery",
    "old {bare} in {place}",
    "the {bare} we saw yesterday",
    "image of {a}, side view",
    "{plural} of {place}",
    "one of the {plural}",
    "{bare} wallpaper",
)
_JUNK = ("IMG_{}.jpg", "DSC{}", "photo {}", "click to enlarge", "image", "untitled", "{}")


@dataclass(frozen=True)
class Labelled:
    """One picture of the archive."""

    name: str
    """Its member name, `class/file`."""
    label: str
    body: bytes


def read(archive: Path) -> list[Labelled]:
    """All pictures of the archive, sorted by name. Raises `UserError` if there are none."""
    found = []
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                label, slash, _ = member.name.removeprefix("./").rpartition("/")
                if member.isreg() and slash and (stream := tar.extractfile(member)):
                    label = label.rpartition("/")[2]
                    found.append(Labelled(member.name, label, stream.read()))
    except tarfile.TarError as error:
        raise UserError(f"{archive}: not a readable tar: {error}") from None
    if not found:
        raise UserError(f"{archive}: no picture in it; sample_web.pictures wants class/name.jpg")
    return sorted(found, key=lambda one: one.name)


def split(
    every: list[Labelled], settings: SampleWebSettings
) -> tuple[list[Labelled], list[Labelled]]:
    """(shown on the web, held out): the same number of each class is held out, by seed.

    A picture with the same bytes as a held-out one is not shown either.
    """
    seed = settings.seed
    order = sorted(every, key=lambda one: (number(seed, "held", one.name), one.name))
    held: list[Labelled] = []
    taken: dict[str, int] = {}
    for one in order:
        if taken.get(one.label, 0) < settings.held_out:
            taken[one.label] = taken.get(one.label, 0) + 1
            held.append(one)
    if len(held) == len(every):
        raise UserError(f"sample_web.held_out: {settings.held_out} a class leaves nothing to show")
    names, bodies = {one.name for one in held}, {one.body for one in held}
    shown = [one for one in order if one.name not in names and one.body not in bodies]
    return shown, sorted(held, key=lambda one: one.name)


def address_of(settings: SampleWebSettings, index: int) -> Address:
    """Where the index-th picture of the web is."""
    host = zipf_host(settings.seed, "photo host", index // 20)
    serial = number(settings.seed, "photo", index) % 10**6
    return Address(host, f"/photos/{index // 20:x}/{serial:06d}-{index % 20}.jpg")


def text_of(settings: SampleWebSettings, index: int, label: str, classes: list[str]) -> Cited:
    """What the web says of a picture; its kind tells junk and lies."""
    rng = random.Random(f"labelled/{settings.seed}/{index}")
    url, mark = address_of(settings, index).url, draw(settings.seed, "noise", index)
    if mark < 0.10:
        return Cited(url, rng.choice(_JUNK).format(rng.randrange(10**4)), "junk_text")
    if mark < 0.15 and len(classes) > 1:
        label = rng.choice([name for name in classes if name != label])
        return Cited(url, _text(rng, label), "wrong_text")
    return Cited(url, _text(rng, label))


def write_site(folder: Path, archive: Path, settings: SampleWebSettings) -> int:
    """Write `pictures-*.sqlite`, `site.sqlite` and `dirt.json`; the number of pictures shown."""
    shown, _ = _archive(archive, settings)
    for first, stop, name in site.picture_files(len(shown)):
        site.write_pictures(folder / name, first, stop, lambda i: shown[i].body, lambda _: None)

    def routes() -> Iterator[site.Route]:
        yield from site.robots(HOSTS)
        for index in range(len(shown)):
            here = address_of(settings, index)
            yield site.Route(here.host, here.path, body=index)

    site.write_site(folder / "site.sqlite", routes(), len(shown))
    kinds = [cited.kind for cited, _ in _rows(settings, shown)]
    numbers = {kind: kinds.count(kind) for kind in ("junk_text", "wrong_text")}
    (folder / "dirt.json").write_text(site.dirt_json(numbers))
    return len(shown)


def write_pool(folder: Path, archive: Path, settings: SampleWebSettings) -> int:
    """Write `pool.parquet` and the evaluation set of the pictures held out; rows of both."""
    shown, held = _archive(archive, settings)
    rows = pool.write_pool(folder / "pool.parquet", _rows(settings, shown), settings.seed)
    classes = sorted({one.label for one in held})
    pictures = ((one.body, classes.index(one.label)) for one in held)
    path = folder / "evaluation" / f"{dataset_name(archive)}.parquet"
    return rows + pool.write_evaluation(path, pictures, classes, TEMPLATES)


def dataset_name(archive: Path) -> str:
    """`cifar10` of `cifar10-train-30000.tar.gz`."""
    return archive.name.split(".")[0].split("-")[0]


def _archive(path: Path, settings: SampleWebSettings) -> tuple[list[Labelled], list[Labelled]]:
    return split(read(path), settings)


def _rows(
    settings: SampleWebSettings, shown: list[Labelled]
) -> Iterator[tuple[Cited, tuple[int, int]]]:
    classes = sorted({one.label for one in shown})
    for index, one in enumerate(shown):
        yield text_of(settings, index, one.label, classes), (0, 0)


def _text(rng: random.Random, label: str) -> str:
    name = label.replace("_", " ")
    if label in OTHER_NAMES and rng.random() < 0.3:
        name = rng.choice(OTHER_NAMES[label])
    some = f"{article(name)} {name}"
    place = rng.choice(PLACES).title()
    form = rng.choice(_FORMS)
    text = form.format(bare=name, a=some, plural=_PLURALS.get(name, name + "s"), place=place)
    return text[0].upper() + text[1:] if rng.random() < 0.4 else text
