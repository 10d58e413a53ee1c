"""The made-up world: its places, things, hosts and common words, and draws that need no state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import xxhash


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_PLACE_FIRST = _words(
    """
    north harrow ember willow saffron thistle marlow juniper larch cobalt hollow winter
    """
)
_PLACE_LAST = _words(
    """
    meadow lake harbour mill bridge orchard hill
    """
)
PLACES = tuple(
    f"{first} {last}"
    for number, (first, last) in enumerate(itertools.product(_PLACE_FIRST, _PLACE_LAST))
    if number % 3 != 1
)
"""Two-word names of places; none holds a colour or a shape of the pictures."""

MATERIALS = _words(
    """
    paper cardboard felt linen cotton ceramic enamel glass copper walnut chalk ink clay
    plaster velvet parchment
    """
)
OBJECTS = _words(
    """
    sign flag tile button badge kite quilt lantern poster stamp coin medal banner window
    plate mosaic brooch card wallpaper ribbon
    """
)
EVENTS = _words(
    """
    fair market festival regatta parade exhibition lottery picnic concert
    """
)
CRAFTS = _words(
    """
    weaving printing pottery embroidery stencilling carving bookbinding enamelling quilting
    marquetry
    """
)
ADJECTIVES = _words(
    """
    old small large bright quiet famous ordinary simple careful early late common rare
    narrow wide gentle plain clear heavy local
    """
)
VERBS = _words(
    """
    shows holds carries bears keeps follows crosses meets touches covers marks opens closes
    turns joins divides
    """
)
COMMON = _words(
    """
    year town people house school book river street garden summer morning colour picture
    line edge corner centre side surface paint brush frame wall paper letter number story
    song name family hand eye ground water light shadow field road gate tower bell clock
    boat wheel
    """
)

DOMAINS = _words(
    """
    meadow harbour paperworks tileyard lanternhouse kiteshop fairground quiltroom postcards
    mapmakers schoolbox drawingroom shapebook colourhouse printroom stencil posterwall
    artbox nursery flashcards signmakers clipart stockroom patterns almanac gazette weekend
    parish museum library crafts toybox wallpaper badges stampclub ribbons mosaics
    glassworks claypit inkwell easel notebook scrapbook pinboard doorway courtyard attic
    millpond
    """
)
_SUBDOMAINS = ("", "www.", "img.", "gallery.", "cdn.", "static.")
HOSTS = tuple(
    f"{_SUBDOMAINS[number * 7 % len(_SUBDOMAINS)]}{domain}.example"
    for number, domain in enumerate(DOMAINS)
)
"""Sites of the sample web, from the largest to the smallest."""

_ZIPF = tuple(itertools.accumulate(1 / (rank + 2) for rank in range(len(HOSTS))))


def draw(*key: object) -> float:
    """A number in [0, 1) that is a pure function of the key."""
    return (number(*key) >> 11) / (1 << 53)


def number(*key: object) -> int:
    """A 64-bit number that is a pure function of the key."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, key)).encode())


def pick(options: Sequence[str], *key: object) -> str:
    """One of `options`, a pure function of the key."""
    return options[number(*key) % len(options)]


def zipf_host(*key: object) -> str:
    """A site, the n-th largest with a probability proportional to 1 / (n + 2)."""
    mark = draw(*key) * _ZIPF[-1]
    return HOSTS[next(rank for rank, total in enumerate(_ZIPF) if mark < total)]
