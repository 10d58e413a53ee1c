"""Finding half a million phrases in texts, word by word, in numpy.

Every text is cut at spaces; a word is looked up once, then the word sequences that begin at each
position are followed through a tree of the phrases. That touches memory a few times per word,
where an Aho-Corasick automaton of this size does so per character; `python -m benchmarks match`
compares it with two. The tree is a handful of arrays, which processes can share as mapped files.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dataset_build.hashing import U64, mix64

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]

_ODD = np.uint64(0x9E3779B97F4A7C15)
_KEEP = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # the first n bytes of eight
_SPACE = 0x20
_HALF = np.uint64(32)
_LARGEST = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Words:
    """The words of a batch of texts: where each is in `data`, and which text has which."""

    data: npt.NDArray[np.uint8]
    """UTF-8 of all texts, then at least eight zero bytes."""
    start: I64
    length: I64
    first: I64
    """Word number at which each text begins; one longer than the texts."""

    def chunk(self, words: I64, number: int) -> U64:
        """Bytes 8·number to 8·number+7 of some words, zero-padded, little-endian."""
        shape = (self.data.size - 7,)
        view = np.ndarray(shape, "<u8", buffer=self.data.data, strides=(1,))
        left = self.length[words] - 8 * number
        chunk: U64 = view[self.start[words] + 8 * number] & _KEEP[np.minimum(left, 8)]
        return chunk

    def hashes(self, seed: int) -> U64:
        """One number a word; words of up to eight bytes and one length never share theirs."""
        length = self.length.astype(np.uint64) * _ODD
        result = mix64((self.chunk(np.arange(self.start.size), 0) ^ np.uint64(seed)) + length)
        number = 1
        while (words := np.flatnonzero(self.length > 8 * number)).size:
            result[words] = mix64(result[words] * _ODD ^ self.chunk(words, number))
            number += 1
        return result

    def take(self, words: I64) -> Words:
        """Some words alone, as one text; no other bytes are kept."""
        length = self.length[words]
        start = np.cumsum(length) - length
        source = np.arange(length.sum()) + np.repeat(self.start[words] - start, length)
        data = np.concatenate([self.data[source], np.zeros(8, np.uint8)])
        return Words(data, start, length, np.array([0, words.size]))


def split(texts: pa.Array, every_space: bool) -> Words:
    """Cut an Arrow string array without nulls at spaces.

    `every_space`: a text has a word more than it has spaces, and words can be empty. Otherwise any
    number of spaces is one boundary.
    """
    count = len(texts)
    _, offset_buffer, data_buffer = texts.buffers()
    wide = pa.types.is_large_string(texts.type)
    offsets = np.frombuffer(offset_buffer, np.int64 if wide else np.int32) if count else np.zeros(1)
    offsets = offsets[texts.offset : texts.offset + count + 1].astype(np.int64)
    begin, end = int(offsets[0]), int(offsets[-1])
    data = np.zeros(end - begin + 8, np.uint8)
    if end > begin:
        data[:-8] = np.frombuffer(data_buffer, np.uint8)[begin:end]
    offsets -= begin
    space = np.flatnonzero(data[:-8] == _SPACE)
    first = np.searchsorted(space, offsets)
    # A word ends at a space or with its text; a word begins with a text or behind a space.
    ends = np.insert(space, first[1:], offsets[1:])
    start = np.insert(space + 1, first[:-1], offsets[:-1])
    length = ends - start
    first = first + np.arange(first.size)
    if not every_space:
        word = np.flatnonzero(length)
        start, length, first = start[word], length[word], np.searchsorted(word, first)
    return Words(data, start, length, first)


@dataclass(frozen=True, eq=False)
class PhraseTree:
    """Phrases of space-separated words; `search` finds all of them in a batch of texts.

    Every field is an array, and one file where the tree is saved. Together about 100 bytes a
    phrase. Words and nodes of the tree are numbered from 0, -1 is none.
    """

    rules: I64
    """Seed of the words' hashes; 1 if words are cut at every space, else 0."""
    word_keys: U64
    """Hashes of the words in ascending order: the place is the word's number. See `_find`."""
    word_index: I32
    word_bytes: npt.NDArray[np.uint8]
    word_start: I64
    word_length: I64
    root: I32
    """Node of the phrases that begin with a word; one more for a word in no phrase."""
    continues: npt.NDArray[np.bool_]
    """Whether a word stands in a phrase behind another; one more as above."""
    edge_keys: U64
    """(node, word) of every edge, ascending. See `_edge` and `_find`."""
    edge_index: I32
    edge_target: I32
    branches: npt.NDArray[np.bool_]
    """Whether a node has edges."""
    phrase: I32
    """First phrase that ends in a node."""
    more_first: I64
    """Where in `more` the other phrases that end in a node are, all equal to the first."""
    more: npt.NDArray[np.uint32]

    @classmethod
    def of(cls, phrases: pa.Array, every_space: bool = False) -> PhraseTree:
        """The tree of some phrases; they are cut into words as `split` does."""
        words = split(phrases, every_space)
        seed = 0
        while True:
            hashes = words.hashes(seed)
            keys, example, token = np.unique(hashes, return_index=True, return_inverse=True)
            if _equal(words, np.arange(hashes.size), words, example[token]).all():
                break
            seed += 1  # two different words share a hash
        vocabulary = words.take(example)
        return cls(
            rules=np.array([seed, every_space], np.int64),
            word_keys=np.append(keys, _LARGEST),
            word_index=_index(keys),
            word_bytes=vocabulary.data,
            word_start=vocabulary.start,
            word_length=vocabulary.length,
            **_grow(token.astype(np.int32), words.first, keys.size),
        )

    def save(self, folder: Path) -> None:
        """Write `folder/<field>.npy` for every field."""
        for field in fields(self):
            np.save(folder / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def load(cls, folder: Path) -> PhraseTree:
        """A tree that was saved, in memory that all processes on a machine share."""
        paths = {field.name: folder / f"{field.name}.npy" for field in fields(cls)}
        mapped = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
        # Plain arrays over the same memory: indexing a memmap takes a detour through Python.
        return cls(**{name: np.asarray(array) for name, array in mapped.items()})

    def search(self, texts: pa.Array) -> tuple[npt.NDArray[np.uint32], I64]:
        """(phrase numbers, offsets): those of text i are values[offsets[i]:offsets[i + 1]].

        Phrase numbers ascend within a text, each once.
        """
        words = split(texts, bool(self.rules[1]))
        token = self._recognise(words)
        node = self.root[token]
        onward = np.append(self.continues[token], False)
        onward[words.first] = False  # a phrase does not run on into the next text
        token = np.append(token, 0)
        at = np.flatnonzero(node >= 0)
        node = node[at]
        found: list[U64] = [np.zeros(0, np.uint64)]
        text = np.repeat(np.arange(len(texts), dtype=np.uint64) << _HALF, np.diff(words.first))
        depth = 1
        while at.size:
            phrase = self.phrase[node]
            ending = np.flatnonzero(phrase >= 0)
            found.append(np.bitwise_or(text[at[ending]], phrase[ending].view(np.uint32)))
            if self.more.size:
                found.append(self._others(text[at[ending]], node[ending]))
            step = np.flatnonzero(self.branches[node] & onward[at + depth])
            at, node = at[step], node[step]
            edge = _find(self.edge_keys, self.edge_index, _edge(node, token[at + depth]))
            taken = np.flatnonzero(edge >= 0)
            at, node = at[taken], self.edge_target[edge[taken]]
            depth += 1
        result = np.concatenate(found)
        result.sort()
        if result.size:
            result = result[np.concatenate([[True], result[1:] != result[:-1]])]
        bounds = np.arange(len(texts) + 1, dtype=np.uint64) << _HALF
        return result.astype(np.uint32), np.searchsorted(result, bounds)

    def _recognise(self, words: Words) -> I32:
        """The number of every word; for one that is in no phrase, the number after the last."""
        unknown = self.word_start.size
        every = np.array([0, unknown])
        vocabulary = Words(self.word_bytes, self.word_start, self.word_length, every)
        number = _find(self.word_keys, self.word_index, words.hashes(int(self.rules[0])))
        candidate = np.flatnonzero(number >= 0)
        same = _equal(words, candidate, vocabulary, number[candidate].astype(np.int64))
        number[candidate[~same]] = unknown
        number[number < 0] = unknown
        return number

    def _others(self, text: U64, node: I32) -> U64:
        """`text | phrase` for all but the first of the phrases that end in each node."""
        first = self.more_first[node]
        count = self.more_first[node + 1] - first
        total = np.cumsum(count)
        within = np.arange(total[-1] if total.size else 0) - np.repeat(total - count, count)
        both: U64 = np.repeat(text, count) | self.more[np.repeat(first, count) + within]
        return both


def _grow(token: I32, first: I64, vocabulary: int) -> dict[str, npt.NDArray[Any]]:
    """The tree's fields from `root` on, built level by level from the phrases' words."""
    length = np.diff(first)
    phrase = np.flatnonzero(length)
    heads, node = np.unique(token[first[phrase]], return_inverse=True)
    root = np.full(vocabulary + 1, -1, np.int32)
    root[heads] = np.arange(heads.size)
    continues = np.zeros(vocabulary + 1, bool)
    nodes, depth = heads.size, 1
    keys, parents = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    ended, ends_in = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    while phrase.size:
        over = length[phrase] == depth
        ended.append(phrase[over])
        ends_in.append(node[over])
        phrase, node = phrase[~over], node[~over]
        word = token[first[phrase] + depth]
        continues[word] = True
        edges, branch = np.unique(_edge(node, word), return_inverse=True)
        keys.append(edges)
        parents.append(node)
        node = branch + nodes
        nodes += edges.size
        depth += 1
    # Edges in the order of their making lead to the nodes after the heads, in that order.
    key = np.concatenate(keys)
    order = np.argsort(key)
    branches = np.zeros(nodes, bool)
    branches[np.concatenate(parents)] = True
    where, which = np.concatenate(ends_in), np.concatenate(ended).astype(np.uint32)
    by_node = np.lexsort((which, where))
    where, which = where[by_node], which[by_node]
    new = np.ones(where.size, bool)
    new[1:] = where[1:] != where[:-1]
    phrase_of = np.full(nodes, -1, np.int32)
    phrase_of[where[new]] = which[new]
    return {
        "root": root,
        "continues": continues,
        "edge_keys": np.append(key[order], _LARGEST),
        "edge_index": _index(key[order]),
        "edge_target": (heads.size + order).astype(np.int32),
        "branches": branches,
        "phrase": phrase_of,
        "more_first": np.searchsorted(where[~new], np.arange(nodes + 1)),
        "more": which[~new],
    }


def _index(keys: U64) -> I32:
    """Where in ascending keys, whose bits are well mixed, each value of their top bits begins."""
    bits = max(1, len(keys).bit_length() + 1)
    tops = (keys >> np.uint64(64 - bits)).astype(np.int64)
    return np.searchsorted(tops, np.arange(1 << bits)).astype(np.int32)


def _find(keys: U64, index: I32, wanted: U64) -> I32:
    """Places in `keys`, which ascend, are unique and end with `_LARGEST`; -1 where absent."""
    shift = np.uint64(65 - len(index).bit_length())
    at: I32 = index[(wanted >> shift).view(np.int64)]
    found = keys[at]
    late = np.flatnonzero(found < wanted)
    while late.size:  # the keys with the same top bits: fewer than one on average
        at[late] += 1
        found[late] = keys[at[late]]
        late = late[found[late] < wanted[late]]
    at[(found != wanted) | (at == len(keys) - 1)] = -1
    return at


def _edge(node: npt.NDArray[np.int_] | I32, word: I32) -> U64:
    """A key for (node, word); as mix64 is a bijection and both are below 2³², it is exact."""
    return mix64(node.astype(np.uint64) << np.uint64(32) | word.astype(np.uint64))


def _equal(a: Words, in_a: I64, b: Words, in_b: I64) -> npt.NDArray[np.bool_]:
    """Whether words in_a[i] of `a` and in_b[i] of `b`, whose hashes are equal, are the same."""
    length = a.length[in_a]
    same: npt.NDArray[np.bool_] = length == b.length[in_b]
    check = np.flatnonzero(same & (length > 8))
    number = 0
    while check.size:
        same[check] = a.chunk(in_a[check], number) == b.chunk(in_b[check], number)
        number += 1
        check = check[same[check] & (a.length[in_a[check]] > 8 * number)]
    return same
