"""Counting the words of a Wikipedia dump, against gensim: how many counts agree, and the speed.

The dump is the excerpt in `$OPENWIT_DATA`. A word agrees if its counts differ by at most 1, or 2 %.
Why one differs is found by experiment: constructs are taken out of the wikitext with
mwparserfromhell, one kind after the other, and the first without which the counts agree is the
reason. Each word that differs is written to `$OPENWIT_WORDS` (default `wikipedia-words.json`).
"""

from __future__ import annotations

import bz2
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mwparserfromhell
from gensim.corpora.wikicorpus import extract_pages, filter_wiki, tokenize

from dataset_build.queries import QueriesSettings
from dataset_build.queries.wikipedia import count_dump, pages
from dataset_build.queries.wikitext import BREAK, words
from pipeline.stats import Stats

_DUMP = "wikipedia/enwiki-206-pages-articles.xml.bz2"
_MIN_COUNT = 5
_REPEATED = 5
_ROUNDS = 2
_WORD = re.compile(r"[^\W\d_]{2,15}")  # what gensim takes for a word

Counts = Counter[str]


def measure() -> Iterator[dict[str, Any]]:
    """Agreement on all that the articles say, and without what most differences are for."""
    if not (folder := os.environ.get("OPENWIT_DATA")):
        raise SystemExit("wikipedia: OPENWIT_DATA is not set; it names the folder with the dump")
    dump = Path(folder) / _DUMP
    with dump.open("rb") as raw:
        articles = {page.title: page.text for page in pages(raw, dump.name, Stats()) if page.text}
    no_less_than = {title: _WITHOUT[_LESS_THAN](text) for title, text in articles.items()}
    no_tables = {title: _WITHOUT["table"](text) for title, text in no_less_than.items()}
    chosen_by_name = {
        "all articles": articles,
        "without less-than signs": no_less_than,
        "without less-than signs and tables": no_tables,
    }
    for name, chosen in chosen_by_name.items():
        yield {"name": f"wikipedia words, {name}", "articles": len(chosen), **_agreement(chosen)}
    reasons = _reasons(articles)
    rows = [
        {"word": word, "ours": ours, "peer": peer, "reason": reason}
        for word, (ours, peer, reason) in sorted(reasons.items())
    ]
    target = Path(os.environ.get("OPENWIT_WORDS", "wikipedia-words.json"))
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    yield {
        "name": "wikipedia words, reasons",
        "ours": len(rows),
        "unit": "words that differ",
        "reasons": dict(Counter(row["reason"] for row in rows).most_common()),
        "list": str(target),
    }
    yield _speed(dump)


def _ours(articles: Mapping[str, str]) -> Counts:
    counts = Counter(word for text in articles.values() for word in words(text).split())
    return Counter({w: n for w, n in counts.items() if w != BREAK and _WORD.fullmatch(w)})


def _peer(articles: Mapping[str, str]) -> Counts:
    return Counter(word for text in articles.values() for word in tokenize(filter_wiki(text)))


def _differ(ours: int, peer: int) -> bool:
    return abs(ours - peer) > max(1.0, 0.02 * max(ours, peer))


def _agreement(articles: Mapping[str, str]) -> dict[str, Any]:
    ours, peer = _ours(articles), _peer(articles)
    often = {w for w in ours | peer if max(ours[w], peer[w]) >= _MIN_COUNT}
    agree = sum(not _differ(ours[word], peer[word]) for word in often)
    equal = sum(ours[word] == peer[word] for word in often)
    return {
        "ours": round(100 * agree / len(often), 2),
        "unit": "% of words within max(1, 2 %)",
        "equal_percent": round(100 * equal / len(often), 2),
        "words": len(often),
        "peer_name": "gensim",
    }


def _reasons(articles: Mapping[str, str]) -> dict[str, tuple[int, int, str]]:
    """Both counts of each word that differs, and what it is for."""
    ours, peer = _ours(articles), _peer(articles)
    open_words = {
        word
        for word in ours | peer
        if max(ours[word], peer[word]) >= _MIN_COUNT and _differ(ours[word], peer[word])
    }
    found: dict[str, tuple[int, int, str]] = {}
    left = dict(articles)
    for reason, without in _WITHOUT.items():
        left = {title: without(text) for title, text in left.items()}
        ours_left, peer_left = _ours(left), _peer(left)
        for word in sorted(open_words):
            if not _differ(ours_left[word], peer_left[word]):
                found[word] = (ours[word], peer[word], reason)
                open_words.remove(word)
    return found | {word: (ours[word], peer[word], "unexplained") for word in open_words}


def _without_pictures(text: str) -> str:
    links = mwparserfromhell.parse(text).filter_wikilinks()
    return _cut(text, [str(x) for x in links if re.match(r"\s*(file|image):", str(x.title), re.I)])


def _without_tags(*names: str) -> Callable[[str], str]:
    def without(text: str) -> str:
        tags = mwparserfromhell.parse(text).filter_tags()
        return _cut(text, [str(tag) for tag in tags if str(tag.tag).lower().strip() in names])

    return without


def _without_tables(text: str) -> str:
    """Also those in which an unclosed `'''` hides the end from the parser."""
    text = _without_tags("table")(text)
    return re.sub(r"^[ :]*\{\|.*?^\s*\|\}", " ", text, flags=re.DOTALL | re.MULTILINE)


def _without_templates(text: str) -> str:
    return _cut(text, [str(x) for x in mwparserfromhell.parse(text).filter_templates()])


def _without_addresses(text: str) -> str:
    return _cut(text, [str(x) for x in mwparserfromhell.parse(text).filter_external_links()])


def _cut(text: str, constructs: list[str]) -> str:
    for construct in sorted(constructs, key=len, reverse=True):
        text = text.replace(construct, " ")
    return text


def _without(pattern: str) -> Callable[[str], str]:
    return lambda text: re.sub(pattern, " ", text, flags=re.IGNORECASE)


_LESS_THAN = "less-than sign"  # gensim drops all up to the next tag: "<10 ppm … <sup>"
_WITHOUT: dict[str, Callable[[str], str]] = {
    _LESS_THAN: _without(r"&lt;(?![a-z/!])|<(?![a-z/!])"),
    "self-closing <ref/>": _without(r"<ref\b[^<>]*/>"),
    "other <ref>": _without_tags("ref"),
    "gallery": _without_tags("gallery", "imagemap", "timeline"),
    "picture": _without_pictures,
    "table": _without_tables,
    "formula or code": _without_tags(
        *("math", "chem", "source", "syntaxhighlight", "code", "pre", "nowiki", "score")
    ),
    "template": _without_templates,
    "link to a language or category": _without(r"\[\[:?[a-z][a-z-]+:[^\[\]]*\]\]"),
    "address": _without_addresses,
    "italics within a word": _without(r"\w+''+\w+|''+\w+''+(?=\w)"),
    "index within a word": _without(r"\w+<su[bp]>[^<]*</su[bp]>\w+"),
    "letters beside digits": _without(r"\w*\d\w*"),
    "entity": _without(r"&#?\w+;"),
    "letters outside ASCII": _without(r"[^\s]*[^\x00-\x7f][^\s]*"),
}


def _speed(dump: Path) -> dict[str, Any]:
    """Processor seconds from the compressed dump to counts, ours with bigrams and titles."""
    xml = bz2.decompress(dump.read_bytes())
    begin, end = xml.index(b"<page>"), xml.rindex(b"</page>") + len(b"</page>")
    streams = [xml[:begin], *[xml[begin:end]] * _REPEATED, xml[end:]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large = folder / "large.xml.bz2"
        large.write_bytes(b"".join(map(bz2.compress, streams)))
        ours_s = peer_s = float("inf")
        stats = Stats()
        for _ in range(_ROUNDS):  # in turns
            start = time.process_time()
            stats = count_dump(
                large,
                folder,
                "all",
                fold_case=True,
                max_held=QueriesSettings().max_counts_held,
                progress=lambda done, total: None,
            )
            ours_s = min(ours_s, time.process_time() - start)
            start = time.process_time()
            peer_words = _gensim(large)
            peer_s = min(peer_s, time.process_time() - start)
        floor = min(_decompress(large) for _ in range(_ROUNDS))
    megabytes = sum(map(len, streams)) / 1e6
    return {
        "name": "wikipedia speed",
        "ours": round(megabytes / ours_s, 2),
        "peer": round(megabytes / peer_s, 2),
        "ratio": round(peer_s / ours_s, 2),
        "unit": "MB of XML a second of one core",
        "ours_s": round(ours_s, 2),
        "peer_s": round(peer_s, 2),
        "bz2_s": round(floor, 2),
        "megabytes": round(megabytes, 1),
        "articles": stats.counts["articles"],
        "ours_words": stats.counts["words_read"],
        "peer_words": peer_words,
        "peer_name": "gensim",
    }


def _gensim(dump: Path) -> int:
    counts: Counts = Counter()
    with bz2.open(dump) as opened:
        for _, text, _ in extract_pages(opened, filter_namespaces=("0",)):
            counts.update(tokenize(filter_wiki(text)))
    return counts.total()


def _decompress(dump: Path) -> float:
    start = time.process_time()
    bz2.decompress(dump.read_bytes())
    return time.process_time() - start
