"""WordNet's synsets, from Princeton's database files (`data.noun`, `data.verb`, `data.adj`,
`data.adv`): their lemmas, and what they are kinds of.

Format: wndb(5WN), https://wordnet.princeton.edu/documentation/wndb5wn
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from dataset_build.records import WORDNET
from pipeline.config import BadInput

# synset_offset lex_filenum ss_type w_cnt, and of each word its lex_id.
_BEGIN = re.compile(r"(\d{8}) \d\d ([nvasr]) ([0-9a-f]{2})(?= )")
# Where an adjective may stand in a sentence: (a) before a noun, (p) after, (ip) both.
_MARKER = re.compile(r"\((?:a|p|ip)\)$")
_HYPERNYMS = frozenset({"@", "@i"})  # what it is a kind of, what it is an instance of


class Synset(NamedTuple):
    """A set of words with one meaning."""

    key: str
    """Its offset and part of speech, as `02084071-n`; NLTK's `of2ss` takes it."""
    lemmas: tuple[str, ...]
    """Its words, with spaces in place of "_"."""
    hypernyms: tuple[str, ...]
    """Keys of the synsets that it is a kind or an instance of."""


def synsets(path: Path) -> Iterator[Synset]:
    """The synsets of one data file, in its order.

    Raises `BadInput` naming the line of anything else than a synset, and if there is none.
    """
    is_licence = True
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                raise BadInput(f"{path}:{number}: cut off in mid-line; take a whole copy")
            if line.startswith("  "):
                continue
            is_licence = False
            try:
                line.encode()  # what was no UTF-8 cannot be
                yield _synset(line)
            except ValueError:
                raise BadInput(
                    f"{path}:{number}: not a WordNet synset; queries.wordnet takes the database's"
                    " data files (data.noun, data.verb, data.adj, data.adv), or their folder"
                ) from None
    if is_licence:
        raise BadInput(f"{path}: no synset in it; take a whole copy")


def _synset(line: str) -> Synset:
    """One line; raises `ValueError` if its fields do not add up."""
    begin = _BEGIN.match(line)
    if begin is None:
        raise ValueError
    offset, part, count = begin.groups()
    fields = line[begin.end() + 1 :].partition("|")[0].split()
    words = 2 * int(count, 16)
    lemmas = [_MARKER.sub("", word).replace("_", " ") for word in fields[:words:2]]
    pointers = fields[words + 1 : words + 1 + 4 * int(fields[words] if words < len(fields) else "")]
    if not lemmas or len(pointers) != 4 * int(fields[words]):
        raise ValueError
    hypernyms = [
        f"{target}-{of}"
        for symbol, target, of in zip(pointers[::4], pointers[1::4], pointers[2::4], strict=True)
        if symbol in _HYPERNYMS
    ]
    part = "a" if part == "s" else part  # a satellite is an adjective, and pointed to as one
    return Synset(f"{offset}-{part}", tuple(lemmas), tuple(dict.fromkeys(hypernyms)))


def depths(all_synsets: Iterable[Synset]) -> dict[str, int]:
    """How many steps it takes from each synset up to one that is a kind of nothing, at least.

    Two verbs of WordNet 3.0 are kinds of each other: where nothing else leads up, the first of a
    circle, by its key, counts as its top.
    """
    above = {synset.key: synset.hypernyms for synset in all_synsets}
    below: dict[str, list[str]] = defaultdict(list)
    for key, hypernyms in above.items():
        for hypernym in hypernyms:
            below[hypernym].append(key)
    found: dict[str, int] = {}
    tops = [key for key, hypernyms in above.items() if not any(map(above.__contains__, hypernyms))]
    _descend(tops, below, found)
    for key in sorted(above.keys() - found.keys()):
        if key not in found:
            _descend([_circle_above(key, above)], below, found)
    return found


def _descend(tops: Iterable[str], below: Mapping[str, list[str]], found: dict[str, int]) -> None:
    """Note the depth of whatever is not found yet below some tops."""
    level, depth = list(tops), 0
    while level:
        found.update(dict.fromkeys(level, depth))
        lower = dict.fromkeys(low for high in level for low in below[high])
        level, depth = [key for key in lower if key not in found], depth + 1


def _circle_above(key: str, above: Mapping[str, Sequence[str]]) -> str:
    """The first, by its key, of the circle that one gets into from a synset without a top."""
    way: list[str] = []
    while key not in way:
        way.append(key)
        key = next(hypernym for hypernym in above[key] if hypernym in above)
    return min(way[way.index(key) :])


def table(all_synsets: Sequence[Synset], query_ids: Mapping[str, int]) -> pa.Table:
    """`wordnet.parquet`, by key; `query_ids` has the number of the query that a lemma is."""
    depth = depths(all_synsets)
    rows = [
        {
            "synset": synset.key,
            "lemmas": synset.lemmas,
            "query_ids": [query_ids.get(lemma) for lemma in synset.lemmas],
            "hypernyms": synset.hypernyms,
            "depth": depth[synset.key],
        }
        for synset in sorted(all_synsets)
    ]
    return pa.Table.from_pylist(rows, schema=WORDNET)
