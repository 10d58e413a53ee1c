"""The web's dirt in known numbers: addresses that fail, lie or attack, and texts that say nothing.

Each kind has its number of addresses; `dirt.json` holds the numbers, so that a build can be held
to account for every one of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sample_web import scenes
from sample_web.pairs import Address, Cited, repeat_kind, text_of
from sample_web.vocabulary import OBJECTS, PLACES, number, zipf_host

if TYPE_CHECKING:
    from sample_web.stage import SampleWebSettings

WEIGHTS = {
    "not_found": 20,
    "unknown_host": 4,
    "forbidden": 5,
    "server_error": 4,
    "redirect": 7,
    "redirect_private": 3,
    "redirect_loop": 1.5,
    "redirect_file": 1.5,
    "private_address": 2,
    "html_as_picture": 5,
    "short_body": 3,
    "cut_picture": 3,
    "opt_out": 5,
    "robots": 2,
    "placeholder": 5,
    "svg": 3,
    "tracking_pixel": 5,
    "data_uri": 2,
    "broken_url": 2,
    "junk_text": 6,
    "stuffed_text": 2,
    "long_text": 1,
    "foreign_text": 6,
    "garbled_text": 2,
    "wrong_text": 4,
}
"""Kind -> parts of the dirt."""
FEW = {"slow": 12, "endless": 6, "pixel_bomb": 4}
"""Kinds that cost a reader time or memory: at most so many addresses, however large the web."""

TRUE_PICTURE = frozenset(
    {"redirect", "short_body", "cut_picture", "opt_out", "robots", "slow"}
    | {kind for kind in WEIGHTS if kind.endswith("_text")}
)
"""Kinds whose addresses hold a picture of their own behind the dirt."""
NO_ROUTE = frozenset({"unknown_host", "private_address", "data_uri", "broken_url"})
"""Kinds that the server knows nothing of."""

ROBOTS_HOST = "keepout.example"
PRIVATE_TARGETS = (
    "http://169.254.169.254/latest/meta-data/{name}.jpg",
    "http://127.0.0.1:{port}/canary/{name}.jpg",
    "http://localhost:{port}/canary/{name}.jpg",
    "http://10.0.0.1/{name}.jpg",
    "http://192.168.1.1/{name}.jpg",
    "http://[::1]:{port}/canary/{name}.jpg",
    "http://2130706433:{port}/canary/{name}.jpg",
    "http://0x7f.1:{port}/canary/{name}.jpg",
)


@dataclass(frozen=True)
class Fault:
    """One dirty address as a page cites it, and how the server answers there."""

    number: int
    kind: str
    cited: Cited
    address: Address | None
    picture: int | None = None
    """Number of the picture behind it, if the kind has one."""
    detail: int = field(default=0, compare=False)
    """Tells variants of one kind apart."""


def counts(settings: SampleWebSettings) -> dict[str, int]:
    """Kind -> number of addresses, without the repeated true pairs."""
    if not settings.dirt:
        return {}
    total = settings.dirt * settings.pairs
    parts = sum(WEIGHTS.values())
    found = {kind: max(1, round(total * weight / parts)) for kind, weight in WEIGHTS.items()}
    few = {kind: min(most, max(1, round(total / 60))) for kind, most in FEW.items()}
    return found | few


def all_counts(settings: SampleWebSettings) -> dict[str, int]:
    """Kind -> number of addresses, the repetitions of true pairs included."""
    found = counts(settings) | dict.fromkeys(("duplicate", "recaptioned", "alias"), 0)
    for index in range(settings.pairs):
        if kind := repeat_kind(settings, index):
            found[kind] += 1
    return dict(sorted(found.items()))


def pictures(settings: SampleWebSettings) -> int:
    """How many pictures the web has: the true pairs', then one per fault that hides one."""
    owned = sum(n for kind, n in counts(settings).items() if kind in TRUE_PICTURE)
    return settings.pairs + owned


def faults(settings: SampleWebSettings) -> Iterator[Fault]:
    """Every dirty address, in the order of their numbers."""
    position, own = 0, settings.pairs
    for kind, count in counts(settings).items():
        for detail in range(count):
            index = None
            if kind in TRUE_PICTURE:
                index, own = own, own + 1
            yield _fault(settings, position, kind, detail, index)
            position += 1


def in_pool(fault: Fault) -> bool:
    """Whether the pool cites it rather than the archive."""
    return fault.number % 10 == 9 and fault.kind not in ("data_uri", "broken_url")


def _fault(
    settings: SampleWebSettings, position: int, kind: str, detail: int, index: int | None
) -> Fault:
    seed = settings.seed
    # Whatever is not behind the address, its text is as good as any other.
    shown = index if index is not None else settings.pairs * 3 + position
    rng = random.Random(f"dirt/{seed}/{position}")
    text = _text(settings, kind, shown, rng)
    address: Address | None = None
    if kind == "unknown_host":
        url = f"http://gone{position}.nowhere.example/{rng.randrange(10**6)}.jpg"
    elif kind == "private_address":
        url = PRIVATE_TARGETS[detail % len(PRIVATE_TARGETS)].format(name=f"d{position}", port=80)
    elif kind == "data_uri":
        url = f"data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAA{position:07d}="
    elif kind == "broken_url":
        forms = (
            "javascript:void({})",
            "ftp://files.example/{}.jpg",
            "http://",
            "mailto:print{}@postcards.example",
        )
        url = forms[detail % len(forms)].format(position)
        url += "" if url != "http://" else f"[{position}"
    else:
        host = ROBOTS_HOST if kind == "robots" else zipf_host(seed, "dirt host", position)
        extension = {"svg": "svg", "tracking_pixel": "gif"}.get(kind, "jpg")
        name = f"{number(seed, 'dirt name', position) % 10**8:x}-{position:x}"
        address = Address(host, f"/media/{name}.{extension}")
        url = address.url
    return Fault(position, kind, Cited(url, text, kind), address, index, detail)


def _text(settings: SampleWebSettings, kind: str, shown: int, rng: random.Random) -> str:
    if kind == "junk_text":
        serial = rng.randrange(10**4)
        forms = (
            f"IMG_{serial}.jpg",
            "",
            "click here",
            f"DSC{serial:05d}",
            "image",
            "...",
            "&nbsp;",
        )
        return rng.choice(forms)
    if kind == "stuffed_text":
        names = rng.sample(scenes.seen_classes(), 20)
        return ", ".join(f"{name}, buy {name}, cheap {name} photo" for name in names)
    if kind == "long_text":
        words = [text_of(settings, settings.pairs * 4 + rng.randrange(10**6)) for _ in range(400)]
        return " / ".join(words)[:10_240]
    if kind == "foreign_text":
        return _foreign(rng)
    if kind == "wrong_text":
        return text_of(settings, shown + 1, 2)
    text = text_of(settings, shown)
    if kind == "garbled_text":
        return rng.choice(
            (
                f"{text} â€“ cafÃ© at {rng.choice(PLACES)}",
                f"{text}\x00\x07 \u202e{rng.choice(OBJECTS)}",
                f"  {text}\n\t \u200b on  two   lines\ufeff ",
                text.replace(" ", "\u00a0") + " &amp;amp; more",
            )
        )
    if kind == "tracking_pixel":
        return "" if rng.random() < 0.7 else text
    return text


_LANGUAGES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "{colour}{shape}的图片": (
        {"red": "红色的", "blue": "蓝色的", "green": "绿色的"},
        {"circle": "圆形", "square": "正方形", "triangle": "三角形", "heart": "心形"},
    ),
    "{colour}{shape}の写真": (
        {"red": "赤い", "blue": "青い", "yellow": "黄色い"},
        {"circle": "丸", "square": "四角", "star": "星", "heart": "ハート"},
    ),
    "{colour} {shape}, рисунок": (
        {"red": "красный", "blue": "синий", "black": "чёрный"},
        {"circle": "круг", "square": "квадрат", "cross": "крест", "diamond": "ромб"},
    ),
    "{shape} {colour}": (
        {"red": "أحمر", "blue": "أزرق", "green": "أخضر"},
        {"square": "مربع", "triangle": "مثلث", "heart": "قلب", "arrow": "سهم"},
    ),
}
"""Form -> words for colours and shapes."""


def _foreign(rng: random.Random) -> str:
    form = rng.choice(list(_LANGUAGES))
    colours, shapes = _LANGUAGES[form]
    pairs = [(s, c) for s in shapes for c in colours if (s, c) not in scenes.UNSEEN]
    shape, colour = rng.choice(pairs)
    return form.format(shape=shapes[shape], colour=colours[colour])
