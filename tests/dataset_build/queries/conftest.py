"""A small encyclopedia, its page views and a WordNet, in the formats of the real ones."""

from __future__ import annotations

import bz2
import gzip
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pyarrow.parquet as pq
import pytest

from dataset_build.queries import STAGE, QueriesSettings
from dataset_build.text import TextSettings
from pipeline.config import Settings
from pipeline.manifest import Manifest
from pipeline.stage import Run, Stage
from pipeline.stats import Stats

Built = tuple[list[dict[str, Any]], Stats]
Build = Callable[..., Built]


class Root(Settings):
    """A configuration of this stage alone."""

    text: TextSettings = TextSettings()
    queries: QueriesSettings = QueriesSettings()


def dump(pages: Sequence[tuple[str, int, str]]) -> bytes:
    """A MediaWiki export of (title, namespace, wikitext); "#REDIRECT" texts are redirects."""
    body = []
    for number, (title, namespace, text) in enumerate(pages, 1):
        led = re.match(r"#REDIRECT \[\[(.*)\]\]", text)
        redirect = f'<redirect title="{escape(led[1])}" />' if led else ""
        body.append(
            f"<page><title>{escape(title)}</title><ns>{namespace}</ns><id>{number}</id>{redirect}"
            f"<revision><id>{number}</id><timestamp>2024-01-01T00:00:00Z</timestamp>"
            "<contributor><username>A</username><id>1</id></contributor><model>wikitext</model>"
            f'<format>text/x-wiki</format><text xml:space="preserve">{escape(text)}</text>'
            "<sha1>x</sha1></revision></page>"
        )
    return (
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10" '
        'xml:lang="en"><siteinfo><sitename>Wikipedia</sitename><dbname>enwiki</dbname>'
        "<base>https://en.wikipedia.org/wiki/Main_Page</base><generator>MediaWiki</generator>"
        '<case>first-letter</case><namespaces><namespace key="0" case="first-letter" />'
        '<namespace key="1" case="first-letter">Talk</namespace></namespaces></siteinfo>'
        + "".join(body)
        + "</mediawiki>"
    ).encode()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder with dump.xml.bz2, pageviews-*.gz, data.noun, data.adj and own.txt."""
    articles = [
        ("Dog", 0, "The dog runs. " * 9 + "[[Golden Retriever|golden retriever]]\n" * 6),
        ("St. Louis", 0, "St. Louis has an arch. " * 5),
        ("Mercury (planet)", 0, "Mercury is a planet near the sun.\n" * 3),
        ("Mercury (disambiguation)", 0, "Mercury may be."),
        ("Talk:Dog", 1, "chatter " * 50),
        ("Hound", 0, "#REDIRECT [[Dog]]"),
    ]
    (tmp_path / "dump.xml.bz2").write_bytes(bz2.compress(dump(articles)))
    hours = [
        "de Dog 900 0\nen Dog 40 0\nen Mercury_(planet) 30 0\nen Special:Search 999 0\n",
        "en St._Louis 20 1\nen.m Dog 40 0\nen.m Mercury_(disambiguation) 99 0\nen Hound 80 0\n",
        "en.m St._Louis 60 0\nen Nowhere 500 0\nen - 5 0\nen Mercury_(planet) 39 0\nen Dog x 0\n",
    ]
    for hour, text in enumerate(hours):
        path = tmp_path / f"pageviews-20240101-{hour:02}0000.gz"
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    (tmp_path / "data.noun").write_text(
        "  1 This is a licence\n"
        "00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which exists\n"
        "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 001 @ 00001740 n 0000 | a dog\n"
        "02099601 05 n 01 golden_retriever 0 001 @ 02084071 n 0000 | a retriever\n"
    )
    (tmp_path / "data.adj").write_text(
        "  1 This is a licence\n"
        "00001740 00 a 01 awake(p) 0 000 | not asleep\n"
        "00014490 00 s 01 well-lit(a) 0 000 | bright\n"
    )
    (tmp_path / "own.txt").write_text("Golden Gate Bridge\n\n!!!\ngolden gate bridge\n")
    return tmp_path


@pytest.fixture
def build(tmp_path: Path, run_stage: Callable[[Run, Stage], list[Manifest]]) -> Build:
    """`build(wikipedia=[...], limit=5, ...)`: rows of queries.parquet and the statistics."""

    def run_build(*, fold_case: bool = True, run: Path | None = None, **settings: Any) -> Built:
        config = Root(text=TextSettings(fold_case=fold_case), queries=QueriesSettings(**settings))
        folder = Run(run or tmp_path / "run", config)
        manifests = run_stage(folder, STAGE)
        rows = pq.read_table(folder.path("queries:queries.parquet")).to_pylist()
        return rows, sum((m.stats for m in manifests), Stats())

    return run_build
