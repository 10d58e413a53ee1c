"""CLIP's byte-pair encoding without torch, which a worker process would load in seconds and 300 MB.

The vocabulary is the file that open_clip brings, the ids are those of its `SimpleTokenizer`. Words
are remembered: a caption of known words costs one pass of a regular expression.
"""

from __future__ import annotations

import gzip
import html
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import ftfy
import numpy as np
import regex
from numpy.typing import NDArray

_MERGES = 49152 - 256 - 2
_START, _END = "<start_of_text>", "<end_of_text>"
_WORD = regex.compile(
    rf"{_START}|{_END}|'(?:s|t|re|ve|m|ll|d)|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)
_MAX_WORDS = 1 << 17  # some 40 MB; the words of web captions never end

Ids = tuple[int, ...]


class Tokenizer:
    """Texts to token ids. `context_length`: tokens a text is cut to, start and end included."""

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self._vocabulary = _vocabulary()
        self._words = dict(self._vocabulary.special)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[int]]:
        return type(self), (self.context_length,)

    def __call__(self, text: str) -> NDArray[np.int64]:
        """Token ids [context], zeros after the end token; a text too long is cut before it."""
        special = self._vocabulary.special
        ids = [special[_START][0]]
        for word in _WORD.findall(clean(text)):
            ids += self._words.get(word) or self._encode(word)
        del ids[self.context_length - 1 :]
        ids += special[_END]
        tokens = np.zeros(self.context_length, np.int64)
        tokens[: len(ids)] = ids
        return tokens

    def _encode(self, word: str) -> Ids:
        if len(self._words) >= _MAX_WORDS:
            self._words = dict(self._vocabulary.special)
        ids = self._words[word] = self._vocabulary.encode(word.encode())
        return ids


def clean(text: str) -> str:
    """Mojibake and HTML entities repaired, white space single, lower case."""
    # Plain ASCII has none of what the first two would repair, each at ten times this test's cost.
    if not (text.isascii() and text.isprintable()) or "&" in text:
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class _Vocabulary:
    """Symbols are ids throughout; 0 to 255 are bytes, 256 to 511 bytes that end a word."""

    def __init__(self, merges: list[str]) -> None:
        names = list(_byte_names().values())
        names += [f"{name}</w>" for name in names]
        pairs = [tuple(merge.split()) for merge in merges]
        names += ["".join(pair) for pair in pairs]
        # Two merges may spell the same symbol: its id is the later one's, its rank is by the pair.
        symbol = {name: number for number, name in enumerate(names)}
        self._merge = {
            (symbol[first], symbol[second]): (rank, symbol[first + second])
            for rank, (first, second) in enumerate(pairs)
        }
        self._byte = [symbol[_byte_names()[byte]] for byte in range(256)]
        self._last_byte = [symbol[_byte_names()[byte] + "</w>"] for byte in range(256)]
        self.special: dict[str, Ids] = {_START: (len(names),), _END: (len(names) + 1,)}

    def encode(self, word: bytes) -> Ids:
        """Merge the pair of lowest rank, everywhere, until none is left."""
        symbols = [self._byte[byte] for byte in word[:-1]] + [self._last_byte[word[-1]]]
        while len(symbols) > 1:
            found = [pair for pair in pairwise(symbols) if pair in self._merge]
            if not found:
                break
            best = min(found, key=self._merge.__getitem__)
            merged = []
            position = 0
            while position < len(symbols):
                if tuple(symbols[position : position + 2]) == best:
                    merged.append(self._merge[best][1])
                    position += 2
                else:
                    merged.append(symbols[position])
                    position += 1
            symbols = merged
        return tuple(symbols)


@lru_cache
def _byte_names() -> dict[int, str]:
    """How the vocabulary's file writes each byte, in the order of their ids.

    Bytes that Latin-1 prints come first and as it prints them, the others from U+0100 on.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {
        byte: chr(256 + number) for number, byte in enumerate(others)
    }


@lru_cache
def _vocabulary() -> _Vocabulary:
    spec = find_spec("open_clip")  # finds the folder; the package itself would load torch
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    return _Vocabulary(lines[1 : _MERGES + 1])
