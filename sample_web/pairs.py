"""The sample web's true pairs: which picture has which address and which captions, by number.

Everything is a function of (settings, number), so tasks that render, cite and route the same
picture need not talk to each other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sample_web import scenes
from sample_web.vocabulary import MATERIALS, OBJECTS, PLACES, draw, number, pick, zipf_host

if TYPE_CHECKING:
    from sample_web.stage import SampleWebSettings

ALBUM = 6  # pictures of one archive file that share a page, a host and a folder


@dataclass(frozen=True)
class Address:
    """Where a picture is: `http://host/path`."""

    host: str
    path: str
    """With its query, as a browser shows it: no percent signs."""

    @property
    def url(self) -> str:
        """The absolute address."""
        return f"http://{self.host}{self.path}"


@dataclass(frozen=True)
class Cited:
    """An address with what a page says about it."""

    url: str
    text: str
    kind: str = ""
    """Sort of dirt; "" for a true pair at its own address."""


def home(settings: SampleWebSettings, index: int) -> int:
    """The archive file that cites this picture first, or -1 if only the pool knows it."""
    if draw(settings.seed, "pool", index) < settings.pool_share:
        return -1
    return index % settings.archive_files


def scene_of(settings: SampleWebSettings, index: int) -> scenes.Scene:
    """What picture `index` shows."""
    sides = (settings.shortest_side, settings.longest_side)
    return scenes.scene(settings.seed, index, sides=sides)


def picture(settings: SampleWebSettings, index: int) -> bytes:
    """The JPEG file of picture `index`."""
    quality = 80 + number(settings.seed, "quality", index) % 14
    return scenes.jpeg(scenes.render(scene_of(settings, index)), quality)


def text_of(settings: SampleWebSettings, index: int, variant: int = 0) -> str:
    """A caption of picture `index`; variants are told independently."""
    rng = random.Random(f"caption/{settings.seed}/{index}/{variant}")
    text = scenes.caption(scene_of(settings, index), rng)
    tail = rng.random()
    if tail < 0.12:
        text += f" at {rng.choice(PLACES).title()}"
    elif tail < 0.2:
        text += f", {rng.choice(MATERIALS)}"
    elif tail < 0.28:
        thing = f"{rng.choice(MATERIALS)} {rng.choice(OBJECTS)}"
        text += f" on {scenes.article(thing)} {thing}"
    return text


def address_of(settings: SampleWebSettings, index: int) -> Address:
    """The picture's own address; the pictures of an album share host and folder."""
    seed, files = settings.seed, settings.archive_files
    file, position = index % files, index // files
    album = position // ALBUM * files + file
    host = zipf_host(seed, "host", album)
    folder = pick(
        ("albums", "img/2019", "uploads/prints", "a", "wp-content/media"), seed, "f", album
    )
    name = pick(("{}.jpg", "IMG_{}.jpg", "photo-{}.jpeg", "{}", "{}.JPG"), seed, "n", album)
    serial = (1000 + number(seed, "name", index) % 9000) * 10 + position % ALBUM
    path = f"/{folder}/{album:x}/{name.format(serial)}"
    special = draw(seed, "path", index)
    if special < 0.03:
        path += f"?w=640&v={index % 7}"
    elif special < 0.05:
        path = path.replace(f"/{folder}/", f"/{folder}/größe é/")
    return Address(host, path)


def alias_of(settings: SampleWebSettings, index: int) -> Address:
    """Another address, on another site, at which the same bytes are."""
    host = zipf_host(settings.seed, "alias host", index)
    return Address(host, f"/reposted/{number(settings.seed, 'alias', index) % 10**9}-{index}.jpg")


def mirror_of(settings: SampleWebSettings, copy: int) -> tuple[Address, int]:
    """Address and picture of the copy-th repetition; the server needs no table for these."""
    index = number(settings.seed, "mirror", copy) % settings.pairs
    return Address(f"mirror{copy % 97}.example", f"/mirror/{index}/{copy}.jpg"), index


def repeats(settings: SampleWebSettings, file: int) -> Iterator[Cited]:
    """What archive file `file` cites again of what another one, mostly of another crawl, cites."""
    files = settings.archive_files
    other = (file + files // 2) % files
    for index in range(other, settings.pairs, files):
        if home(settings, index) < 0:
            continue
        kind = repeat_kind(settings, index)
        if kind == "duplicate":
            yield Cited(address_of(settings, index).url, text_of(settings, index), kind)
        elif kind == "recaptioned":
            yield Cited(address_of(settings, index).url, text_of(settings, index, 1), kind)
        elif kind == "alias":
            yield Cited(alias_of(settings, index).url, text_of(settings, index, 1), kind)


def repeat_kind(settings: SampleWebSettings, index: int) -> str:
    """How a picture of the archive is cited again: `duplicate`, `recaptioned`, `alias` or ""."""
    if home(settings, index) < 0:
        return ""
    mark = draw(settings.seed, "repeat", index)
    for kind, until in (("duplicate", 0.5), ("recaptioned", 0.75), ("alias", 1.0)):
        if mark < until * settings.repeat_share:
            return kind
    return ""
