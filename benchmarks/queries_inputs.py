"""Inputs of `benchmarks.queries`, made up in the formats and the proportions of the real ones.

A multistream dump with its index: streams of a hundred pages, every second one a redirect; words by
a Zipf law, with fixed phrases among them, links, templates, references and tables. Hourly page view
files: a title a line and site, most viewed by a Zipf law, among lines of other wikis.
"""

from __future__ import annotations

import bz2
import gzip
import html
import multiprocessing
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

WORDS = 1_500_000
HOURS = 24
_PHRASES = 150_000
_PAGES = 100  # a stream
_UNITS = 380  # words of an article, on average
_VIEWED = 300_000  # title of rank r is viewed _VIEWED / r times an hour and site, on average
_SYLLABLES = re.findall("..", "bakotiramesodalinovoquesinpetaroricafelushu")
_HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11"
  xml:lang="en">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <dbname>enwiki</dbname>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="1" case="first-letter">Talk</namespace>
    </namespaces>
  </siteinfo>
"""
_PAGE = """  <page>
    <title>{title}</title>
    <ns>0</ns>
    <id>{number}</id>{redirect}
    <revision>
      <id>{number}</id>
      <timestamp>2024-01-01T00:00:00Z</timestamp>
      <contributor><username>Editor</username><id>1</id></contributor>
      <model>wikitext</model>
      <format>text/x-wiki</format>
      <text bytes="{size}" xml:space="preserve">{text}</text>
      <sha1>phoiac9h4m842xq45sp7s6u21eteeq1</sha1>
    </revision>
  </page>
"""
_MARKUP = [
    "in {0}.", "as {0},", "({0})", "'''{0}'''", "[[{0}]]", "[[{0}|{1}s]]", "{0}.\n\n== {1} ==\n",
    '{0}.<ref name="{1}">{{{{cite web|url=https://{0}.example/{1}|title={1}}}}}</ref>',
    "{{{{convert|{0}|km}}}}", "[[File:{0}.jpg|thumb|right|{0} {1}]]",
    '\n{{| class="wikitable"\n|-\n! {0}\n|-\n| {1} || {0}\n|}}\n', "{0} &ndash; {1}",
]  # fmt: skip


def word(number: int) -> str:
    """Another made-up word for every number, the short ones first."""
    number += len(_SYLLABLES)
    text = ""
    while number:
        number, syllable = divmod(number, len(_SYLLABLES))
        text += _SYLLABLES[syllable]
    return text


def title(number: int) -> str:
    """Another title for every number."""
    text = word(number).capitalize()
    if number % 3 == 0:
        text += f" {word(number // 1000).capitalize()}"
    return f"{text} ({word(number % 50)})" if number % 7 == 0 else text


@cache
def _units() -> npt.NDArray[np.object_]:
    """Words by rank, then phrases by rank, then words in markup; escaped as XML wants it."""
    rng = np.random.default_rng(0)
    words = [word(number) for number in range(WORDS)]
    pairs = rng.integers(1000, WORDS // 30, (_PHRASES, 2)).tolist()
    phrases = [f"{words[first]} {words[second]}" for first, second in pairs]
    marked = [
        html.escape(_MARKUP[at % len(_MARKUP)].format(words[first], words[second]), quote=False)
        for at, (first, second) in enumerate(rng.integers(0, 10_000, (10_000, 2)).tolist())
    ]
    return np.array([*words, *phrases, *marked], dtype=object)


def _stream(number: int) -> tuple[int, bytes, list[tuple[int, str]]]:
    """Bytes of XML in stream `number`, the stream, and numbers and titles of its pages."""
    rng = np.random.default_rng([1, number])
    lengths = np.ceil(rng.lognormal(np.log(_UNITS) - 0.5, 1, _PAGES // 2)).astype(np.int64)
    chance = rng.random(3 * lengths.sum()).reshape(3, -1)
    drawn = np.exp(chance[1] * np.log(WORDS)).astype(np.int64) - 1  # Zipf's law
    phrases = WORDS + (chance[1] ** 2 * _PHRASES).astype(np.int64)
    drawn = np.where(chance[0] < 0.1, phrases, drawn)
    marked = WORDS + _PHRASES + (chance[2] * 10_000).astype(np.int64)
    drawn = np.where(chance[0] > 0.93, marked, drawn)
    articles = np.split(_units()[drawn], np.cumsum(lengths)[:-1])
    pages, listed = [], []
    for place in range(_PAGES):
        at = number * _PAGES + place
        redirect = ""
        if place % 2:
            target = title(at - 1)
            redirect = f'\n    <redirect title="{target}" />'
            text = f"#REDIRECT [[{target}]]"
        else:
            text = " ".join(articles[place // 2].tolist())
        name = title(at)
        listed.append((at + 1, name))
        pages.append(
            _PAGE.format(title=name, number=at + 1, redirect=redirect, size=len(text), text=text)
        )
    xml = "".join(pages).encode()
    return len(xml), bz2.compress(xml), listed


def write_dump(folder: Path, xml_bytes: int) -> Path:
    """A dump of at least `xml_bytes` of XML, named as Wikimedia names it, and its index."""
    path = folder / "enwiki-20240101-pages-articles-multistream.xml.bz2"
    index = folder / "enwiki-20240101-pages-articles-multistream-index.txt.bz2"
    if path.exists():
        return path
    _units()  # before the processes fork
    written = at = 0
    made = path.with_suffix(".part")
    with (
        multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool,
        made.open("wb") as dump,
        bz2.open(index, "wt") as lines,
    ):
        at += dump.write(bz2.compress(_HEAD.encode()))
        for size, stream, listed in pool.imap(_stream, _endless(xml_bytes)):
            lines.writelines(f"{at}:{page}:{name}\n" for page, name in listed)
            at += dump.write(stream)
            written += size
            if written >= xml_bytes:
                break
        dump.write(bz2.compress(b"</mediawiki>\n"))
    made.rename(path)
    return path


def _endless(xml_bytes: int) -> Iterator[int]:
    """Numbers of streams, some more than it takes."""
    return iter(range(xml_bytes // 50_000))


def write_page_views(folder: Path, titles: int) -> list[Path]:
    """A day of `HOURS` hourly files that view `titles` different titles, or some fewer."""
    names = pa.array([title(number).replace(" ", "_") for number in range(titles)])
    rates = _VIEWED / np.arange(1, titles + 1)
    paths = []
    for hour in range(HOURS):
        path = folder / f"pageviews-20240101-{hour:02}0000.gz"
        paths.append(path)
        if path.exists():
            continue
        rng = np.random.default_rng([2, hour])
        with gzip.open(path.with_suffix(".part"), "wb", compresslevel=1) as out:
            for domain, share in (("de", 0.2), ("en", 1), ("en.m", 1.2), ("fr.m", 0.2)):
                views = rng.poisson(rates * share)
                seen = np.flatnonzero(views)
                columns = [
                    pa.repeat(domain, len(seen)),
                    names.take(pa.array(seen)),
                    pa.array(views[seen]).cast(pa.string()),
                    pa.repeat("0\n", len(seen)),
                ]
                lines = pc.binary_join_element_wise(*columns, " ")
                if domain.startswith("en"):
                    out.write(f"{domain} Special:Search 100 0\n{domain} - 9 0\n".encode())
                    out.write(f"{domain} Caf%C3%A9 8 0\n{domain} Café 7 0\n".encode())
                out.write(b"".join(line.as_buffer() for line in lines))
        path.with_suffix(".part").rename(path)
    return paths
