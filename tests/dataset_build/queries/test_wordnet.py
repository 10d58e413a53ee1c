"""Princeton's files, read whole; odd lines; circles."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from dataset_build.queries.wordnet import Synset, depths, synsets
from pipeline.config import BadInput

INSTALLED = Path("/usr/share/wordnet")


def line_of(text: str, tmp_path: Path) -> list[Synset]:
    (tmp_path / "data.noun").write_text(f"  1 A licence\n{text}\n")
    return list(synsets(tmp_path / "data.noun"))


def test_all_of_wordnet_is_read() -> None:
    """3.0 has 117,659 synsets; its lemmas are those of the index files, which are another way into
    the same database, in lower case."""
    if not (INSTALLED / "data.noun").exists():
        pytest.skip(f"{INSTALLED}: WordNet is not installed")
    found = [synset for path in sorted(INSTALLED.glob("data.*")) for synset in synsets(path)]
    assert len(found) == len({synset.key for synset in found}) == 117_659
    indexed = {
        line.partition(" ")[0].replace("_", " ")
        for part in ("noun", "verb", "adj", "adv")
        for line in (INSTALLED / f"index.{part}").read_text().splitlines()
        if not line.startswith("  ")
    }
    assert {lemma.lower() for synset in found for lemma in synset.lemmas} == indexed
    assert len(indexed) == 147_306
    by_key = {synset.key: synset for synset in found}
    assert all(hypernym in by_key for synset in found for hypernym in synset.hypernyms)
    depth = depths(found)
    assert depth.keys() == by_key.keys()
    dog = next(s for s in found if s.lemmas[0] == "dog" and s.key.endswith("-n"))
    assert dog.lemmas == ("dog", "domestic dog", "Canis familiaris")
    assert {by_key[above].lemmas[0] for above in dog.hypernyms} == {"canine", "domestic animal"}
    assert depth[dog.key] == 8
    assert depth[next(s.key for s in found if s.lemmas == ("entity",))] == 0
    instance = next(s for s in found if "Albert Einstein" in s.lemmas)
    assert by_key[instance.hypernyms[0]].lemmas[0] == "physicist"


def test_markers_satellites_and_frames(tmp_path: Path) -> None:
    marked = "00014490 00 s 02 well-lit(a) 0 bright(ip) 1 001 & 00001740 a 0000 | shining | light"
    assert line_of(marked, tmp_path) == [Synset("00014490-a", ("well-lit", "bright"), ())]
    verb = "00001740 29 v 01 breathe 0 002 @ 00003131 v 0000 * 00005041 v 0000 01 + 02 00 | air"
    assert line_of(verb, tmp_path) == [Synset("00001740-v", ("breathe",), ("00003131-v",))]


@pytest.mark.parametrize(
    "line",
    [
        "a query",
        "00001740 03 n 02 entity 0 001 ~ 00001930 n 0000 | fewer words than said",
        "00001740 03 n 01 entity 0 002 ~ 00001930 n 0000 | fewer pointers than said",
        "00001740 03 n 01 entity 0",
        "00001740 03 n 00 000 | no word",
        "00001740 03 n",
    ],
)
def test_what_is_no_synset_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(BadInput, match=r"data\.noun:2: not a WordNet synset"):
        line_of(line, tmp_path)


@pytest.mark.parametrize("content", ["", "  1 A licence\n"], ids=["empty", "a licence"])
def test_a_file_without_a_synset_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.noun").write_text(content)
    with pytest.raises(BadInput, match=r"data\.noun: no synset in it"):
        list(synsets(tmp_path / "data.noun"))


@pytest.mark.parametrize("kind", ["latin-1", "gzip"])
def test_what_is_no_text_is_named(tmp_path: Path, kind: str) -> None:
    line = b"00001740 29 n 01 caf\xe9 0 000 | a place\n"
    (tmp_path / "data.noun").write_bytes(line if kind == "latin-1" else gzip.compress(line) + b"\n")
    with pytest.raises(BadInput, match=r"data\.noun:1: not a WordNet synset"):
        list(synsets(tmp_path / "data.noun"))


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    line = "00001740 29 v 01 breathe 0 002 @ 00003131 v 0000 * 00005041 v 0000 01 + 02 00 | air"
    (tmp_path / "data.verb").write_text(f"{line}\n{line[:-4]}")
    with pytest.raises(BadInput, match=r"data\.verb:2: cut off"):
        list(synsets(tmp_path / "data.verb"))


def test_depth_is_that_of_the_shortest_way_up_and_circles_end() -> None:
    graph = {
        "top": [],
        "a": ["top"],
        "b": ["a"],
        "short": ["b", "top"],
        "x": ["y"],
        "y": ["x"],
        "below": ["y"],
        "lost": ["nowhere"],
    }
    found = depths(Synset(key, (key,), tuple(above)) for key, above in graph.items())
    assert found == {
        **dict.fromkeys(("top", "lost", "x"), 0),
        **dict.fromkeys(("a", "short", "y"), 1),
        **dict.fromkeys(("b", "below"), 2),
    }
