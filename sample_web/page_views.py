"""Hourly page views of the encyclopedia, in the files that Wikimedia publishes.

Format: `domain_code page_title count_views total_response_size`, one line a page, sorted, gzip;
titles with underscores, sometimes percent-encoded; `en` and `en.m` are the same encyclopedia.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from sample_web.vocabulary import draw, number

_WEIGHT = {"main": 40, "colour": 12, "shape": 12, "combination": 6, "place": 3, "pattern": 8}
_OTHERS = ("de", "de.m", "fr", "ja", "ru.m", "commons.m", "en.b", "en.d", "wikidata")


def write(folder: Path, titles: Sequence[tuple[str, str]], seed: int, hours: int) -> int:
    """Write `pageviews-YYYYMMDD-HH0000.gz` for `hours` hours from 2026-01-05; lines in all."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = 0
    for hour in range(hours):
        name = f"pageviews-202601{5 + hour // 24:02d}-{hour % 24:02d}0000.gz"
        found = _hour(titles, seed, hour)
        (folder / name).write_bytes(gzip.compress("".join(found).encode(), mtime=0))
        lines += len(found)
    return lines


def _hour(titles: Sequence[tuple[str, str]], seed: int, hour: int) -> list[str]:
    rng = random.Random(f"views/{seed}/{hour}")
    found = []
    for title, kind in titles:
        # A page's popularity is its own, log-uniform over a factor of 60; hours vary by a half.
        popular = _WEIGHT.get(kind, 2) * 60 ** draw(seed, "popular", title)
        for code, share in (("en", 0.4), ("en.m", 0.6)):
            views = round(popular * share * rng.uniform(0.7, 1.3))
            if views:
                found.append(_line(code, _written(title, rng), views, rng))
    for page in ("Special:Search", "Talk:Red", "File:Red.svg", "-", "Category:Shapes"):
        found.append(_line("en", page, rng.randint(50, 900), rng))
    for code in _OTHERS:
        for title, _ in titles[:: 7 + number(seed, code) % 9]:
            found.append(_line(code, _written(title, rng), rng.randint(1, 400), rng))
    found.append(_line("en", '"Red_circle"', 3, rng))
    found.append(_line("en", "Caf%C3", 2, rng))  # a broken percent sequence, as in the real files
    return sorted(found)


def _written(title: str, rng: random.Random) -> str:
    """Underscores for blanks; a few clients escape what needs no escape."""
    name = title.replace(" ", "_")
    if rng.random() < 0.05:
        return quote(name, safe="").replace("_", "%5F")
    return name


def _line(code: str, title: str, views: int, rng: random.Random) -> str:
    return f"{code} {title} {views} {0 if rng.random() < 0.9 else views * 9000}\n"
