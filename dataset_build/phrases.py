"""Finding half a million phrases in texts, word by word, in numpy.

Every text is cut at spaces; a word is looked up once, then the word sequences that begin at each
position are followed through a tree of the phrases. That touches memory a few times per word,
where an Aho-Corasick automaton of this size does so per character; `python -m benchmarks match`
compares it with two.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        result = mix64(self.chunk(np.arange(self.start.size), 0) + np.uint64(seed))
        number = 1
        while (words := np.flatnonzero(self.length > 8 * number)).size:
            result[words] = mix64(result[words] * _ODD ^ self.chunk(words, number))
            number += 1
        return result


def split(texts: pa.Array) -> Words:
    """Cut an Arrow string array without nulls at spaces; any number of them is one boundary."""
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
    inside = np.zeros(data.size - 6, bool)  # a boundary, the bytes, a boundary
    np.not_equal(data[:-8], _SPACE, out=inside[1:-1])
    is_start = inside[1:-1] & ~inside[:-2]
    is_end = inside[1:-1] & ~inside[2:]
    edges = offsets[(offsets > 0) & (offsets < end - begin)]  # texts lie side by side
    is_start[edges] = inside[edges + 1]
    is_end[edges - 1] = inside[edges]
    start = np.flatnonzero(is_start)
    length = np.flatnonzero(is_end) + 1 - start
    return Words(data, start, length, np.searchsorted(start, offsets))


class _Lookup:
    """Position of 64-bit keys in a sorted array of well-mixed unique ones; -1 where absent."""

    def __init__(self, keys: U64) -> None:
        bits = max(1, len(keys).bit_length() + 1)
        self._shift = np.uint64(64 - bits)
        tops = (keys >> self._shift).astype(np.int64)
        self._first = np.searchsorted(tops, np.arange(1 << bits)).astype(np.int32)
        self._keys = np.append(keys, np.uint64(2**64 - 1))
        self._size = len(keys)

    def find(self, keys: U64) -> I32:
        at: I32 = self._first[(keys >> self._shift).view(np.int64)]
        found = self._keys[at]
        late = np.flatnonzero(found < keys)
        while late.size:  # the keys of one bucket: fewer than one on average
            at[late] += 1
            found[late] = self._keys[at[late]]
            late = late[found[late] < keys[late]]
        at[(found != keys) | (at == self._size)] = -1
        return at


class PhraseTree:
    """Phrases of space-separated words; `search` finds all of them in a batch of texts.

    Memory: about 100 bytes a phrase.
    """

    def __init__(self, phrases: pa.Array) -> None:
        words = split(phrases)
        token = self._learn(words)
        self._grow(token, words.first)

    def _learn(self, words: Words) -> I32:
        """Number the distinct words; returns the number of every word."""
        seed = 0
        while True:
            hashes = words.hashes(seed)
            keys, example, token = np.unique(hashes, return_index=True, return_inverse=True)
            if _equal(words, np.arange(hashes.size), words, example[token]).all():
                break
            seed += 1  # two different words share a hash
        self._seed = seed
        self._known = _Lookup(keys)
        self._longest = int(words.length.max(initial=0))
        # Only the examples' bytes are kept.
        length = words.length[example]
        start = np.concatenate([[0], np.cumsum(length)[:-1]]).astype(np.int64)
        source = np.arange(length.sum()) + np.repeat(words.start[example] - start, length)
        data = np.concatenate([words.data[source], np.zeros(8, np.uint8)])
        self._vocabulary = Words(data, start, length, np.zeros(0, np.int64))
        return token.astype(np.int32)

    def _grow(self, token: I32, first: I64) -> None:
        """Build the tree level by level; node numbers are dense, -1 is none."""
        vocabulary = self._vocabulary.start.size
        length = np.diff(first)
        phrase = np.flatnonzero(length)
        heads, node = np.unique(token[first[phrase]], return_inverse=True)
        self._root = np.full(vocabulary + 1, -1, np.int32)  # the last: an unknown word
        self._root[heads] = np.arange(heads.size)
        self._continues = np.zeros(vocabulary + 1, bool)
        nodes, depth = heads.size, 1
        keys, parents = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        ended, ends_in = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        while phrase.size:
            over = length[phrase] == depth
            ended.append(phrase[over])
            ends_in.append(node[over])
            phrase, node = phrase[~over], node[~over]
            word = token[first[phrase] + depth]
            self._continues[word] = True
            edges, branch = np.unique(_edge(node, word), return_inverse=True)
            keys.append(edges)
            parents.append(node)
            node = branch + nodes
            nodes += edges.size
            depth += 1
        # Edges in the order of their making lead to the nodes after the heads, in that order.
        key = np.concatenate(keys)
        order = np.argsort(key)
        self._edges = _Lookup(key[order])
        self._target = (heads.size + order).astype(np.int32)
        self._branches = np.zeros(nodes, bool)
        self._branches[np.concatenate(parents)] = True
        where, which = np.concatenate(ends_in), np.concatenate(ended).astype(np.uint32)
        order = np.lexsort((which, where))
        where, which = where[order], which[order]
        new = np.ones(where.size, bool)
        new[1:] = where[1:] != where[:-1]
        self._phrase = np.full(nodes, -1, np.int32)
        self._phrase[where[new]] = which[new]
        # Equal phrases: all but the first of a node are kept aside, by node.
        self._more_phrases = which[~new]
        self._more = np.bincount(where[~new], minlength=nodes).astype(np.int32)
        self._more_first = np.cumsum(self._more, dtype=np.int64) - self._more

    def search(self, texts: pa.Array) -> tuple[npt.NDArray[np.uint32], I64]:
        """(phrase numbers, offsets): those of text i are values[offsets[i]:offsets[i + 1]].

        Phrase numbers ascend within a text, each once.
        """
        words = split(texts)
        token = self._recognise(words)
        node = self._root[token]
        onward = np.append(self._continues[token], False)
        onward[words.first] = False  # a phrase does not run on into the next text
        token = np.append(token, 0)
        at = np.flatnonzero(node >= 0)
        node = node[at]
        found: list[U64] = [np.zeros(0, np.uint64)]
        text = np.repeat(np.arange(len(texts), dtype=np.uint64) << _HALF, np.diff(words.first))
        depth = 1
        while at.size:
            phrase = self._phrase[node]
            ending = np.flatnonzero(phrase >= 0)
            found.append(np.bitwise_or(text[at[ending]], phrase[ending].view(np.uint32)))
            if self._more_phrases.size:
                found.append(self._others(text[at[ending]], node[ending]))
            step = np.flatnonzero(self._branches[node] & onward[at + depth])
            at, node = at[step], node[step]
            edge = self._edges.find(_edge(node, token[at + depth]))
            taken = np.flatnonzero(edge >= 0)
            at, node = at[taken], self._target[edge[taken]]
            depth += 1
        result = np.concatenate(found)
        result.sort()
        if result.size:
            result = result[np.concatenate([[True], result[1:] != result[:-1]])]
        bounds = np.arange(len(texts) + 1, dtype=np.uint64) << _HALF
        return result.astype(np.uint32), np.searchsorted(result, bounds)

    def _recognise(self, words: Words) -> I32:
        """The vocabulary's number of every word; for one that is not in it, the number after."""
        unknown = self._vocabulary.start.size
        number = self._known.find(words.hashes(self._seed))
        candidate = np.flatnonzero(number >= 0)
        same = _equal(words, candidate, self._vocabulary, number[candidate].astype(np.int64))
        number[candidate[~same]] = unknown
        number[number < 0] = unknown
        return number

    def _others(self, text: U64, node: I32) -> U64:
        """`text | phrase` for all but the first of the phrases that end in each node."""
        count = self._more[node]
        total = np.cumsum(count)
        within = np.arange(total[-1] if total.size else 0) - np.repeat(total - count, count)
        phrase = self._more_phrases[np.repeat(self._more_first[node], count) + within]
        both: U64 = np.repeat(text, count) | phrase
        return both


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
