"""The dump: parses as a MediaWiki export, and its words and word pairs carry information."""

from __future__ import annotations

import bz2
import itertools
import math
import re
from collections import Counter
from typing import Any

import mwparserfromhell
import mwxml
import pytest

from sample_web import encyclopedia, scenes


@pytest.fixture(scope="module")
def dump(web: Any) -> list[tuple[Any, str]]:
    with bz2.open(web.out / "encyclopedia.xml.bz2") as stream:
        found = mwxml.Dump.from_file(stream)
        assert found.site_info.dbname == "enwiki"
        return [(page, next(iter(page)).text) for page in found]


def test_articles_redirects_and_other_namespaces(web: Any, dump: list[tuple[Any, str]]) -> None:
    articles = [p.title for p, _ in dump if p.namespace == 0 and not p.redirect]
    wanted = encyclopedia.titles(web.settings.seed, web.settings.articles)
    assert articles == [title for title, _ in wanted]
    redirects = [(p, text) for p, text in dump if p.redirect]
    assert len(redirects) > 5
    assert all(text.startswith(f"#REDIRECT [[{p.redirect}]]") for p, text in redirects)
    assert {p.namespace for p, _ in dump} >= {0, 1, 6, 10, 14}


def test_wikitext_has_what_must_be_taken_out(dump: list[tuple[Any, str]]) -> None:
    everything = "".join(text for _, text in dump)
    for mark in ("{{Infobox", "<ref", "{| class", "<!--", "[[", "&nbsp;", "'''", "== ", "[http"):
        assert mark in everything, mark
    assert not re.search(r"[^\w](None|nan)[^\w]", everything)


def test_words_that_belong_together_meet_more_often_than_chance(
    dump: list[tuple[Any, str]],
) -> None:
    words: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for page, text in dump:
        if page.namespace or page.redirect:
            continue
        plain = re.findall(r"[a-z]+", mwparserfromhell.parse(text).strip_code().lower())
        words.update(plain)
        pairs.update(itertools.pairwise(plain))
    total = sum(words.values())

    def information(first: str, second: str) -> float:
        return math.log2(pairs[first, second] * total / (words[first] * words[second]))

    assert sum(count >= 100 for count in words.values()) > 50
    assert sum(count == 1 for count in words.values()) > 50  # junk words
    assert pairs["red", "circle"] >= 10
    assert information("red", "circle") > 3
    assert information("north", "meadow") > 3
    assert information("stock", "image") > 5


def test_unseen_combinations_are_not_even_an_article(dump: list[tuple[Any, str]]) -> None:
    everything = " ".join(text.lower() for _, text in dump)
    for shape, colour in scenes.UNSEEN:
        assert f"{colour} {shape}" not in everything
