"""The assembled list: order, thresholds, merging, accounting, sameness."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dataset_build.queries import STAGE, QueriesSettings, counts, plan
from dataset_build.queries.wikipedia import pages
from dataset_build.records import QUERIES, WORDNET
from dataset_build.report.page import REFUSALS
from dataset_build.text import normalise
from pipeline.config import BadInput, ConfigError, MissingInput
from pipeline.stage import Run
from pipeline.stats import Stats

from .conftest import Build, Root, dump


def everything(sources: Path) -> dict[str, Any]:
    return {
        "wikipedia": [f"{sources}/dump.xml.bz2"],
        "page_views": [f"{sources}/pageviews-*.gz"],
        "wordnet": [f"{sources}/data.*"],
        "file": [f"{sources}/own.txt"],
        "min_word_count": 6,
        "min_bigram_count": 5,
        "min_bigram_pmi": 1.0,
    }


def test_order_and_merging(sources: Path, build: Build) -> None:
    rows, stats = build(**everything(sources))
    assert [(row["text"], row["sources"]) for row in rows] == [
        ("Golden Gate Bridge", ["file"]),
        ("the", ["word"]),
        ("dog", ["word", "title", "wordnet"]),
        ("runs", ["word"]),
        ("golden", ["word"]),
        ("retriever", ["word"]),
        ("an arch", ["bigram"]),
        ("has an", ["bigram"]),
        ("louis has", ["bigram"]),
        ("st louis", ["bigram", "title"]),
        ("golden retriever", ["bigram", "wordnet"]),
        ("dog runs", ["bigram"]),
        ("the dog", ["bigram"]),
        ("Canis familiaris", ["wordnet"]),
        ("awake", ["wordnet"]),
        ("domestic dog", ["wordnet"]),
        ("entity", ["wordnet"]),
        ("well-lit", ["wordnet"]),
    ]
    assert [row["query_id"] for row in rows] == [row["rank"] for row in rows] == list(range(18))
    assert all(row["norm"] == normalise(row["text"]) for row in rows)
    by_text = {row["text"]: row for row in rows}
    assert by_text["dog"]["word_count"] == 9
    assert by_text["dog"]["views"] == 80 + 80  # those of Hound, a redirect, too
    assert by_text["golden retriever"]["pair_count"] == 6
    assert by_text["dog"]["pmi"] is None
    assert (by_text["dog"]["synsets"], by_text["the"]["synsets"]) == (1, None)
    assert stats.rows_out == len(rows)
    assert stats.histograms["admitted_by"] == {"file": 1, "word": 5, "bigram": 7, "wordnet": 5}
    dropped = stats.dropped
    assert dropped["not_an_article"] == 1  # no page of the dump
    assert dropped["below_min_views"] == 1  # Mercury (planet): 30 + 39
    assert dropped["disambiguation_page"] == 1
    assert dropped["no_letter_or_number"] == 1
    assert dropped["duplicate"] == 5
    assert stats.counts["malformed_lines"] == 1
    assert stats.counts["redirected_titles"] == 1
    assert dropped.keys() <= REFUSALS.keys()  # the report explains each


def test_pmi_is_that_of_the_paper(sources: Path, build: Build) -> None:
    rows, _ = build(**everything(sources))
    by_text = {row["text"]: row for row in rows}
    # Nine times "the dog runs", six "golden retriever", five "St. Louis has an arch" ("St." ends
    # no sentence, "runs." does), three "Mercury is a planet near the sun", one "Mercury may be".
    words, pairs = 9 * 3 + 6 * 2 + 5 * 5 + 3 * 7 + 3, 9 * 2 + 6 + 5 * 4 + 3 * 6 + 2
    ratio = (6 / pairs) / ((6 / words) * (6 / words))
    assert 2 ** by_text["golden retriever"]["pmi"] == pytest.approx(ratio, rel=1e-4)


def test_the_threshold_of_pmi_is_included(sources: Path, build: Build) -> None:
    """Rounded as it is, lest another machine's last digit decides."""
    rows, _ = build(**everything(sources))
    found = {row["text"]: row["pmi"] for row in rows if row["pmi"] is not None}
    again, _ = build(**{**everything(sources), "min_bigram_pmi": round(min(found.values()), 6)})
    assert {row["text"] for row in again if row["pmi"] is not None} == set(found)


def test_of_redirects_to_several_articles_the_first_by_name_counts(
    sources: Path, build: Build
) -> None:
    for name, target in (("a", "Wolf"), ("b", "Dingo")):
        pages = [(target, 0, "words"), ("Canid", 0, f"#REDIRECT [[{target}]]")]
        (sources / f"{name}.xml").write_bytes(dump(pages))
    (sources / "pageviews-1.gz").write_bytes(gzip.compress(b"en Canid 90 0\n"))
    dumps = [f"{sources}/{name}.xml" for name in "ab"]
    rows, _ = build(wikipedia=dumps, page_views=[f"{sources}/pageviews-1.gz"])
    assert [(row["text"], row["views"]) for row in rows] == [("Dingo", 90)]


def test_a_disk_that_fails_is_not_the_dumps_fault() -> None:
    class Failing(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, _: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        list(pages(io.BufferedReader(Failing()), "x.xml", Stats()))


def test_disambiguators_are_no_part_of_the_name(sources: Path, build: Build) -> None:
    rows, _ = build(**{**everything(sources), "min_views": 69})
    title = next(row for row in rows if row["views"] == 69)
    assert (title["text"], title["sources"]) == ("Mercury", ["title"])


def test_limits(sources: Path, build: Build) -> None:
    rows, stats = build(**{**everything(sources), "max_bigrams": 2, "max_titles": 0})
    texts = [row["text"] for row in rows]
    assert texts[6:10] == ["an arch", "has an", "Canis familiaris", "awake"]
    assert stats.dropped["over_max_bigrams"] == 5
    assert stats.dropped["over_max_titles"] == 1  # St. Louis, whose bigram is over the limit


@pytest.mark.parametrize("limit", range(7, 20))
def test_the_list_has_as_many_as_asked_for_and_all_of_wordnet(
    sources: Path, build: Build, limit: int
) -> None:
    rows, _ = build(**everything(sources))
    everything_else = [row["text"] for row in rows if "wordnet" not in row["sources"]]
    cut, stats = build(**everything(sources), limit=limit, run=sources / "cut")
    assert len(cut) == min(limit, len(rows))
    assert stats.dropped["over_limit"] >= len(rows) - len(cut)
    wordnet = [[r["text"] for r in kept if "wordnet" in r["sources"]] for kept in (rows, cut)]
    assert sorted(wordnet[0]) == sorted(wordnet[1])
    others = [row["text"] for row in cut if "wordnet" not in row["sources"]]
    assert others == everything_else[: len(others)]


def test_a_limit_below_wordnet_is_an_error(sources: Path, build: Build) -> None:
    with pytest.raises(ConfigError, match=r"queries\.limit is 6, and WordNet alone has 7"):
        build(**everything(sources), limit=6)


def test_wordnets_relations_are_written_beside_the_queries(sources: Path, build: Build) -> None:
    rows, stats = build(**{**everything(sources), "wordnet": [str(sources)]})
    table = pq.read_table(sources / "run/queries/out/wordnet.parquet")
    assert table.schema.equals(WORDNET)
    texts = {None: None} | {row["query_id"]: row["text"] for row in rows}
    known = [
        (r["synset"], r["lemmas"], [texts[i] for i in r["query_ids"]], r["hypernyms"], r["depth"])
        for r in table.to_pylist()
    ]
    dog = ["dog", "domestic dog", "Canis familiaris"]
    assert known == [
        ("00001740-a", ["awake"], ["awake"], [], 0),
        ("00001740-n", ["entity"], ["entity"], [], 0),
        ("00014490-a", ["well-lit"], ["well-lit"], [], 0),
        ("02084071-n", dog, dog, ["00001740-n"], 1),
        ("02099601-n", ["golden retriever"], ["golden retriever"], ["02084071-n"], 2),
    ]
    assert stats.counts["synsets"] == 5


@pytest.mark.parametrize("source", ["wordnet", "file", "page_views"])
def test_one_source_is_enough(sources: Path, build: Build, source: str) -> None:
    given = everything(sources)
    rows, stats = build(**{source: given[source]})
    expected = {
        "wordnet": [
            *("Canis familiaris", "awake", "dog", "domestic dog", "entity", "golden retriever"),
            "well-lit",
        ],
        "file": ["Golden Gate Bridge"],
        "page_views": ["Nowhere", "Dog", "Hound", "St. Louis"],
    }
    assert [row["text"] for row in rows] == expected[source]
    assert stats.rows_out == len(rows)


def test_case_is_kept_on_request(sources: Path, build: Build) -> None:
    rows, _ = build(**everything(sources), fold_case=False)
    texts = [row["text"] for row in rows]
    assert "The" in texts
    assert "dog" in texts and "Dog" in texts


def test_a_dump_in_parts_gives_the_same_bytes(sources: Path, build: Build) -> None:
    given = {**everything(sources), "page_views": []}
    build(**given, run=sources / "whole")
    text = bz2.decompress((sources / "dump.xml.bz2").read_bytes()).decode()
    head, *pages = text.removesuffix("</mediawiki>").split("<page>")
    for number, page in enumerate(pages):
        (sources / f"part{number}.xml").write_text(f"{head}<page>{page}</mediawiki>")
    build(**{**given, "wikipedia": [f"{sources}/part*.xml"]}, run=sources / "parts")
    outputs = [sources / run / "queries/out/queries.parquet" for run in ("whole", "parts")]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_memory_changes_no_byte(sources: Path, build: Build, monkeypatch: Any) -> None:
    """Neither does it when each page has files of its own, and each bigram lies elsewhere."""
    given = {**everything(sources), "page_views": []}
    build(**given, run=sources / "whole")
    monkeypatch.setattr(counts, "_CHUNK", 1)
    build(**given, max_counts_held=3, run=sources / "parts")
    parts = list((sources / "parts/queries/out").glob("counts-pairs-*.parquet"))
    assert len(parts) > 2
    outputs = [sources / run / "queries/out/queries.parquet" for run in ("whole", "parts")]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_another_threshold_counts_no_dump_again(sources: Path) -> None:
    def fingerprints(**settings: Any) -> list[str]:
        config = Root(queries=QueriesSettings(**{**everything(sources), **settings}))
        return [p.fingerprint for p in STAGE.planned(Run(sources / "run", config), 0, 0)]

    before = fingerprints()
    assert fingerprints(min_word_count=7, limit=9, wordnet=[], max_counts_held=5) == before
    after = fingerprints(wiki="de")
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_what_is_missing_is_named(sources: Path, build: Build) -> None:
    with pytest.raises(ConfigError, match="give at least one of wikipedia, page_views"):
        plan(Run(sources / "run", Root()))
    with pytest.raises(MissingInput, match=r"queries\.wordnet: .*nothing\.\*: no such input"):
        build(wordnet=[f"{sources}/nothing.*"])
    with pytest.raises(BadInput, match=r"own\.txt: not a Wikipedia dump"):
        build(wikipedia=[f"{sources}/own.txt"])
    with pytest.raises(BadInput, match=r"own\.txt:1: not a WordNet synset"):
        build(wordnet=[f"{sources}/own.txt"])
    with pytest.raises(BadInput, match=r"no page views of 'fr' in it"):
        build(page_views=[f"{sources}/pageviews*"], wiki="fr")
    with pytest.raises(BadInput, match=r"dump\.xml\.bz2: not UTF-8"):
        build(file=[f"{sources}/dump.xml.bz2"])
    with pytest.raises(ConfigError, match="no query passed the thresholds"):
        build(wikipedia=[f"{sources}/dump.xml.bz2"])
    (sources / "empty.txt").write_text("\n \n")
    with pytest.raises(BadInput, match="none of the sources holds anything"):
        build(file=[f"{sources}/empty.txt"])


def test_dump_cut_off_is_labelled(sources: Path, build: Build) -> None:
    whole = dump([(f"T{i}", 0, f"word{i} common words. " * 30) for i in range(40)])
    (sources / "cut.xml").write_bytes(whole[: len(whole) * 2 // 3])
    rows, stats = build(wikipedia=[f"{sources}/cut.xml"], min_word_count=20)
    assert stats.counts["truncated_files"] == 1
    assert 20 < stats.counts["articles"] < 40
    assert f"after {stats.counts['articles']} pages" in stats.warnings[f"{sources}/cut.xml"]
    assert {row["text"] for row in rows} >= {"common", "word0", "word19"}


@pytest.mark.parametrize("kind", ["rss", "no page", "redirects", "stub"])
def test_a_dump_without_words_is_said(sources: Path, build: Build, kind: str) -> None:
    whole = dump([("T", 0, "words")]).decode()
    contents = {
        "rss": "<rss><channel/></rss>",
        "no page": dump([]).decode(),
        "redirects": dump([("Talk:T", 1, "talk")]).decode(),
        "stub": whole.replace("words", ""),
    }
    (sources / "x.xml").write_text(contents[kind])
    given = {"wikipedia": [f"{sources}/x.xml"], "file": [f"{sources}/own.txt"]}
    if kind == "rss":
        with pytest.raises(BadInput, match=r"x\.xml: not a Wikipedia dump"):
            build(**given)
    else:
        _, stats = build(**given)
        assert "no article with a word in it" in stats.warnings[f"{sources}/x.xml"]


@pytest.mark.parametrize(
    ("whole", "broken"),
    [
        ("<ns>1</ns>", "<ns>one</ns>"),
        ("<title>Late</title>", ""),
        ("<mediawiki", '<?xml version="1.0" encoding="klingon"?><mediawiki'),
    ],
)
def test_a_dump_with_a_page_of_no_sense_is_named(
    sources: Path, build: Build, whole: str, broken: str
) -> None:
    text = dump([("T", 0, "words " * 20), ("Late", 1, "more")]).decode()
    assert whole in text
    before, found, after = text.rpartition(whole)
    (sources / "x.xml").write_text(before + (broken if found else "") + after)
    given = {"wikipedia": [f"{sources}/x.xml"], "file": [f"{sources}/own.txt"]}
    if "encoding" in broken:
        with pytest.raises(BadInput, match=r"x\.xml: not a Wikipedia dump"):
            build(**given)
    else:
        _, stats = build(**given, min_word_count=20)
        assert "damaged or cut off after 1 pages" in stats.warnings[f"{sources}/x.xml"]


def test_a_dump_by_several_names_is_counted_once(sources: Path, build: Build) -> None:
    (sources / "link.xml.bz2").symlink_to("dump.xml.bz2")
    once = build(wikipedia=[f"{sources}/dump.xml.bz2"], min_word_count=1)
    assert build(wikipedia=[f"{sources}/*.xml.bz2"], min_word_count=1) == once


def test_own_lists_are_taken_as_they_are_named(sources: Path, build: Build) -> None:
    for name, text in (("b", "quokka\n"), ("a", "Quokka\nwombat\nWombat\nWOMBAT\n"), ("c", " \n")):
        (sources / f"{name}.txt").write_text(text)
    rows, stats = build(file=[f"{sources}/{name}.txt" for name in "bac"], limit=1)
    assert [row["text"] for row in rows] == ["quokka"]
    assert stats.histograms["cut_off"] == {"file": 1}  # however often, and whatever its case
    assert stats.dropped == {"over_limit": 1, "duplicate": 3}
    assert stats.warnings == {f"{sources}/c.txt": "no query in it"}


def test_schema(sources: Path, build: Build) -> None:
    build(**everything(sources))
    assert pq.read_schema(sources / "run/queries/out/queries.parquet").equals(QUERIES)


def test_real_dump(build: Build) -> None:
    """An excerpt of the real English Wikipedia."""
    if not (folder := os.environ.get("OPENWIT_DATA")):
        pytest.skip("OPENWIT_DATA is not set: no real dump to read")
    rows, stats = build(
        wikipedia=[f"{folder}/wikipedia/*.xml.bz2"], min_word_count=10, min_bigram_count=8
    )
    sources = Counter(row["sources"][0] for row in rows)
    assert stats.counts["articles"] == 106
    assert sources["word"] > 5000
    assert sources["bigram"] > 2000
    best = [row["text"] for row in rows if "bigram" in row["sources"]][:60]
    assert {"los angeles", "hong kong", "prime minister"} <= set(best)
    words = {row["text"] for row in rows[: sources["word"]]}
    markup = {"thumb", "cite", "ref", "nbsp", "br", "http", "https", "www", "infobox", "quot"}
    assert not words & markup
