"""`Matcher` against the definition, and the `match` stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dataset_build import match, records
from dataset_build.match import Matcher, MatchSettings
from dataset_build.text import TextSettings, normalise
from pipeline.config import Settings
from pipeline.manifest import Manifest
from pipeline.stage import Run, Stage

few_words = st.lists(st.sampled_from(["a", "b", "ab", "ba", "é", "Ab", "aaaaaaaaa"]), max_size=5)
phrase = st.builds(
    lambda words, gap: gap.join(words), few_words, st.sampled_from([" ", "  ", "-", ", "])
)
anything = st.text(st.sampled_from("aAbB .-'éßK京\u00ad\ud800\u0301"), max_size=8)
texts = st.lists(phrase | anything, max_size=12)


def by_definition(queries: list[str], captions: list[str]) -> list[list[int]]:
    norms = [normalise(query) for query in queries]
    spaced = [f" {normalise(caption)} " for caption in captions]
    return [
        [i for i, norm in enumerate(norms) if norm and f" {norm} " in caption] for caption in spaced
    ]


@settings(max_examples=400, deadline=None)
@given(queries=texts, captions=texts)
def test_finds_exactly_what_the_definition_says(queries: list[str], captions: list[str]) -> None:
    found = Matcher(queries).match(captions)
    assert found.type == pa.list_(pa.uint32())
    assert found.to_pylist() == by_definition(queries, captions)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_long_words_that_differ_late_are_different(data: st.DataObject) -> None:
    word = st.text("ab", min_size=1, max_size=40)
    queries = data.draw(st.lists(word, max_size=10))
    captions = data.draw(st.lists(st.lists(word | st.sampled_from(queries or ["a"])), max_size=5))
    joined = [" ".join(words) for words in captions]
    assert Matcher(queries).match(joined).to_pylist() == by_definition(queries, joined)


@pytest.mark.parametrize(
    ("queries", "caption", "expected"),
    [
        (["St. Louis", "st louis", "ST-LOUIS"], "The St. Louis arch", [0, 1, 2]),
        (["dog"], 'a "dog" here', [0]),
        (["new york", "york", "new", "new york city"], "New  York", [0, 1, 2]),
        (["cat"], "concatenate", []),
        (["", "...", "cat"], "", []),
        (["", "...", "cat"], "... cat ...", [2]),
        (["a b a", "b a b", "a b"], "a b a b a", [0, 1, 2]),
        (["東京"], "東京タワー", [0]),
        (["don't"], "I don t", [0]),
    ],
)
def test_examples(queries: list[str], caption: str, expected: list[int]) -> None:
    assert Matcher(queries).match([caption]).to_pylist() == [expected]


def test_a_query_does_not_run_on_into_the_next_text() -> None:
    assert Matcher(["new york"]).match(["new", "york", "", "new york"]).to_pylist() == [
        [],
        [],
        [],
        [0],
    ]


def test_arrow_inputs_slices_chunks_nulls() -> None:
    matcher = Matcher(pa.chunked_array([["zero", "red"], ["Dog"]]))
    captions = pa.array(["zero", "a red dog", None, "Ünder a DOG", "red"])
    assert matcher.match(captions).to_pylist() == [[0], [1, 2], [], [2], [1]]
    assert matcher.match(captions.slice(1, 3)).to_pylist() == [[1, 2], [], [2]]
    assert matcher.match(captions.slice(3)).to_pylist() == [[2], [1]]
    chunked = pa.chunked_array([captions.slice(4), captions.slice(1, 1)], pa.string())
    assert matcher.match(chunked).to_pylist() == [[1], [1, 2]]
    assert matcher.match(pa.chunked_array([], pa.string())).to_pylist() == []
    assert Matcher([]).match(captions).to_pylist() == [[]] * 5


def test_normalised_input_is_taken_as_it_is() -> None:
    matcher = Matcher(["Dog", "dog"], normalised=True)
    assert matcher.match(["a Dog", "a dog"], normalised=True).to_pylist() == [[0], [1]]


def test_case_is_kept_if_asked() -> None:
    matcher = Matcher(["Apple", "apple"], fold_case=False)
    assert matcher.match(["Apple-pie", "É apple"]).to_pylist() == [[0], [1]]


def test_more_texts_than_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "_BATCH_ROWS", 7)
    monkeypatch.setattr(match, "_BATCH_BYTES", 40)
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(list("abcd"), n)) for n in rng.integers(0, 60, 100)]
    queries = ["a", "b c", "d d d", "a b c d", "c"]
    assert Matcher(queries).match(captions).to_pylist() == by_definition(queries, captions)


def test_hash_collisions_between_words_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hash of four bits for a seed below 3, words collide until another seed is taken."""
    from dataset_build.phrases import Words

    exact = Words.hashes

    def poor(self: Words, seed: int) -> np.ndarray:
        return exact(self, seed) & np.uint64(15 if seed < 3 else 2**64 - 1)

    monkeypatch.setattr(Words, "hashes", poor)
    queries = [f"word{i}-which-is-long{i % 3}" for i in range(50)]
    assert Matcher(queries).match(queries).to_pylist() == by_definition(queries, queries)


class Config(Settings):
    text: TextSettings = TextSettings()
    match: MatchSettings = MatchSettings()


QUERIES = ["red", "dog", "red dog", "zebra"]


def publish_inputs(
    run: Run, publish: Callable[..., Manifest], files: list[list[tuple[str, str]]]
) -> None:
    def queries(folder: Path) -> None:
        table = pa.table({"norm": [normalise(q) for q in QUERIES]})
        pq.write_table(table, folder / "queries.parquet")

    def candidates(folder: Path) -> None:
        for number, rows in enumerate(files):
            table = pa.Table.from_pylist(
                [
                    {
                        "url": url,
                        "text": text,
                        "page_url": "https://page.example/",
                        "source": "alt",
                        "snapshot": "S",
                        "file": f"f{number}",
                    }
                    for url, text in rows
                ],
                schema=records.CANDIDATES,
            )
            pq.write_table(table, folder / f"candidates-{number:05d}.parquet")

    publish(run, "queries", queries)
    publish(run, "extract", candidates)


@pytest.mark.parametrize("buckets", [1, 8])
def test_stage(
    tmp_path: Path,
    run_stage: Callable[[Run, Stage], list[Manifest]],
    publish_files: Callable[..., Manifest],
    buckets: int,
) -> None:
    run = Run(tmp_path, Config(match=MatchSettings(buckets=buckets)))
    rows = [(f"https://e.example/{i}.jpg", f"A red-dog {i}" if i % 3 else "cat") for i in range(90)]
    publish_inputs(run, publish_files, [rows[:60], rows[60:], []])
    manifests = run_stage(run, match.STAGE)
    assert [(m.stats.rows_in, m.stats.rows_out) for m in manifests] == [(60, 40), (30, 20), (0, 0)]
    assert manifests[0].stats.dropped == {"unmatched": 20}
    assert manifests[0].stats.counts["matches"] == 120
    assert manifests[0].stats.histograms["queries_per_text"] == {"0": 20, "2": 40}
    found: list[tuple[str, str]] = []
    for manifest in manifests:
        path = run.path(f"match:{manifest.outputs[0].name}")
        parquet = pq.ParquetFile(path)
        assert parquet.schema_arrow.equals(records.MATCHED)
        assert parquet.num_row_groups == buckets
        for bucket in range(buckets):
            group = parquet.read_row_group(bucket)
            keys = list(zip(group["url_hash"].to_pylist(), group["uid"].to_pylist(), strict=True))
            assert keys == sorted(keys)
            for row in group.to_pylist():
                url, norm = row["url"], normalise(row["text"])
                assert row["url_hash"] == xxhash.xxh3_64_intdigest(url.encode())
                assert row["url_hash"] * buckets >> 64 == bucket
                assert row["uid"] == xxhash.xxh3_128_digest(f"{url}\0{norm}".encode())
                assert row["query_ids"] == [0, 1, 2]
                found.append((url, row["text"]))
    assert sorted(found) == sorted(row for row in rows if row[1] != "cat")


def test_stage_keeps_unmatched_if_asked(
    tmp_path: Path,
    run_stage: Callable[[Run, Stage], list[Manifest]],
    publish_files: Callable[..., Manifest],
) -> None:
    run = Run(tmp_path, Config(match=MatchSettings(buckets=2, keep_unmatched=True)))
    publish_inputs(run, publish_files, [[("https://e.example/1", "cat"), ("u:2", "a zebra")]])
    (manifest,) = run_stage(run, match.STAGE)
    table = pq.read_table(run.path("match:matched-00000.parquet"))
    assert dict(zip(table["text"].to_pylist(), table["query_ids"].to_pylist(), strict=True)) == {
        "cat": [],
        "a zebra": [3],
    }
    assert manifest.stats.counts["unmatched"] == 1


def test_settings_refuse_buckets_that_are_no_power_of_two() -> None:
    with pytest.raises(ValidationError, match="48 is not a power of two; use 32 or 64"):
        MatchSettings(buckets=48)
