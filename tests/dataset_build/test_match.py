"""`Matcher` against both definitions, and against the README's table."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataset_build import match
from dataset_build.match import Compat, Matcher
from dataset_build.text import metaclip_spaced, normalise

few_words = st.lists(st.sampled_from(["a", "b", "ab", "ba", "é", "Ab", "aaaaaaaaa"]), max_size=5)
phrase = st.builds(
    lambda words, gap: gap.join(words), few_words, st.sampled_from([" ", "  ", "-", ", "])
)
anything = st.text(st.sampled_from("aAbB .-'éßK京\u00ad\ud800\u0301"), max_size=8)
texts = st.lists(phrase | anything, max_size=12)


raw = st.text(st.sampled_from("aB  ..,`'\"-()\t\n\0日本éß🐶\ufe0f\ud800"), max_size=10)
# Queries out of the captions, so that many are found.
piece = st.tuples(raw, st.integers(0, 9), st.integers(0, 9)).map(
    lambda drawn: metaclip_spaced(drawn[0])[drawn[1] : drawn[1] + drawn[2]]
)


def by_definition(queries: list[str], captions: list[str]) -> list[list[int]]:
    norms = [normalise(query) for query in queries]
    spaced = [f" {normalise(caption)} " for caption in captions]
    return [
        [i for i, norm in enumerate(norms) if norm and f" {norm} " in caption] for caption in spaced
    ]


def by_metaclip(queries: list[str], captions: list[str]) -> list[list[int]]:
    spaced = [f" {metaclip_spaced(caption)} " for caption in captions]
    return [[i for i, query in enumerate(queries) if f" {query} " in each] for each in spaced]


def reloaded(matcher: Matcher) -> Matcher:
    with tempfile.TemporaryDirectory() as folder:
        matcher.save(Path(folder))
        return Matcher.load(Path(folder))


def agree(
    queries: list[str], captions: list[str], compat: Compat | None, expected: list[list[int]]
) -> None:
    """Made or loaded, in one batch or in pieces, a matcher finds what is expected."""
    made = Matcher(queries, compat=compat)
    for matcher in (made, reloaded(made)):
        found = matcher.match(captions)
        assert found.type == pa.list_(pa.uint32())
        assert found.to_pylist() == expected
        half = len(captions) // 2
        parts = [captions[:half], [], captions[half : half + 1], captions[half + 1 :]]
        assert [row for part in parts for row in matcher.match(part).to_pylist()] == expected
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(match, "_BATCH_ROWS", 2)
            assert matcher.match(captions).to_pylist() == expected


@settings(max_examples=300, deadline=None)
@given(queries=texts, captions=texts)
def test_finds_exactly_what_the_definition_says(queries: list[str], captions: list[str]) -> None:
    agree(queries, captions, None, by_definition(queries, captions))


@settings(max_examples=300, deadline=None)
@given(queries=st.lists(piece | raw, max_size=12), captions=st.lists(raw, max_size=12))
@example(queries=["", " ", "a", "a\0", "\0", "\0\0"], captions=["", " ", "a.", "a\0", "\0  \0\0"])
@example(queries=["a ", " a"], captions=["a", "a.", ".a", "a ", " a"])
def test_metaclip_mode_is_its_substring_search(queries: list[str], captions: list[str]) -> None:
    agree(queries, captions, "metaclip", by_metaclip(queries, captions))


ROW = re.compile(r"\| `(.+?)` \| `(.+?)` \| (yes|no) \| (yes|no) \|")


def golden_table() -> list[tuple[str, str, bool, bool]]:
    """(query, caption, found, found by metaclip) from the README; \\uXXXX is that character."""
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    section = readme.split("## Which captions a query finds\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    rows = []
    for line in lines:
        row = ROW.fullmatch(line)
        assert row, f"not a row: {line}"
        query, caption = (
            re.sub(r"\\u([0-9a-f]{4})", lambda hit: chr(int(hit[1], 16)), cell)
            for cell in row.group(1, 2)
        )
        rows.append((query, caption, row[3] == "yes", row[4] == "yes"))
    return rows


@pytest.mark.parametrize(("query", "caption", "found", "by_metaclip"), golden_table())
def test_the_readme_says_what_is_found(
    query: str, caption: str, found: bool, by_metaclip: bool
) -> None:
    assert Matcher([query]).match([caption]).to_pylist() == [[0] * found]
    blind = Matcher([query], compat="metaclip")
    assert blind.match([caption]).to_pylist() == [[0] * by_metaclip]


def test_the_readme_has_a_row_of_every_kind() -> None:
    outcomes = [row[2:] for row in golden_table()]
    assert len(outcomes) >= 20
    assert set(outcomes) == {(True, True), (True, False), (False, True), (False, False)}


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
    captions = pa.array(["zero", "a red dog", None, "Ünder a DOG", "red"])  # None: as ""
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
    agree(queries, queries, None, by_definition(queries, queries))


@pytest.mark.parametrize("queries", [[], ["", "..."]])
def test_no_usable_query_finds_nothing_and_can_be_saved(queries: list[str]) -> None:
    agree(queries, ["a", "", "..."], None, [[], [], []])


def test_saved_matchers_keep_their_options() -> None:
    captions = ["an Apple.", "an apple."]
    cased = reloaded(Matcher(["Apple"], fold_case=False))
    assert cased.match(captions).to_pylist() == [[0], []]
    blind = reloaded(Matcher(["Apple", "an Apple . "], compat="metaclip"))
    assert blind.match(captions).to_pylist() == [[0, 1], []]
    spaced = ["an Apple . ", "Apple."]
    assert blind.match(spaced, normalised=True).to_pylist() == [[0, 1], []]
    assert blind.match(pa.array(spaced), normalised=True).to_pylist() == [[0, 1], []]


def test_a_loaded_matcher_lies_in_its_files(tmp_path: Path) -> None:
    Matcher(["red dog", "red", "Red"]).save(tmp_path)
    tree = Matcher.load(tmp_path)._tree
    arrays = [value for value in vars(tree).values() if value.size]
    assert len(arrays) > 10
    for array in arrays:
        assert type(array) is np.ndarray  # not the subclass, whose indexing is slow
        assert isinstance(array.base, np.memmap)
