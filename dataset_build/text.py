"""The two forms of every text: `clean`, which is stored, and `normalise`, which is compared.

A query occurs in a caption iff `" " + normalise(query) + " "` is a substring of
`" " + normalise(caption) + " "`. Both sides pass through one function, so "St. Louis" is found in
"the st louis arch", and so is anything else that differs only in case, punctuation or spacing.

MetaCLIP reads otherwise (Xu et al. 2023): there `" " + query + " "` must be a substring of
`" " + metaclip_spaced(caption) + " "`. The query stays as it is written, so one that contains any
of the marks that are spaced in captions is not found.
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import regex

from pipeline.config import Settings

NORM_ID = "words-1"
"""Version of the rules of `normalise`; results with different versions cannot be compared."""


class TextSettings(Settings):
    """How texts are compared."""

    fold_case: bool = True
    """Whether "Apple" and "apple" are the same word. Off, a caption needs the query's capitals."""

    def identity(self) -> dict[str, Any]:
        """With the version of `normalise`'s rules."""
        return {**super().identity(), "norm_id": NORM_ID}


# Written without spaces between words, so that each character stands as a word of its own and a
# query matches inside a longer run. Hangul puts spaces between words and needs no such treatment.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\u30FC\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_LETTER = rf"[[\p{{L}}\p{{N}}]--[{_UNSPACED}]]"
_INNER = rf"[[\p{{L}}\p{{N}}\p{{Mn}}\p{{Mc}}]--[{_UNSPACED}]]"
# U+0345, the iota subscript, is the one mark that folds to a letter: no part of such a character.
_WORD = regex.compile(
    rf"(?V1)[[{_UNSPACED}]&&[\p{{L}}\p{{N}}]][[\p{{Mn}}\p{{Mc}}]--\u0345]*+|{_LETTER}{_INNER}*+"
)
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
_DELICATE = regex.compile(rf"[\p{{M}}\p{{Default_Ignorable_Code_Point}}{_UNSPACED}]")

_ASCII = {
    fold: bytes(
        (ord(c.lower()) if fold else i) if (c := chr(i)).isalnum() and i < 128 else 32
        for i in range(256)
    )
    for fold in (False, True)
}


def normalise(text: str, fold_case: bool = True) -> str:
    """The words of `text`, compatibility-composed (NFKC), case-folded, separated by single spaces.

    A word is a run of letters, marks and numbers. Everything else is a boundary, apostrophes and
    hyphens too: "don't" is `don t`, "O'Brien" `o brien`, "New-York" `new york`. Invisible
    characters (soft hyphen, joiners, variation selectors) and marks with no letter before them
    vanish. Characters of scripts without spaces (Han, kana, Thai, Lao, Khmer, Burmese) are words
    each, with their marks. Idempotent; never raises, lone surrogates included.
    """
    if text.isascii():
        return b" ".join(text.encode().translate(_ASCII[fold_case]).split()).decode()
    text = unicodedata.normalize("NFKC", text)
    while not unicodedata.is_normalized("NFKC", words := _words(text, fold_case)):
        # What folding took apart ("ǰ") NFKC composes again: then the text is as it will stay.
        before, text = text, unicodedata.normalize("NFKC", words)
        if text == before:
            return text
    return words


def _words(text: str, fold_case: bool) -> str:
    folded = text.translate(_FOLD[fold_case])
    if _LOOK_CLOSER not in folded:
        return " ".join(folded.split())
    text = _INVISIBLE.sub("", text)
    words = " ".join(_WORD.findall(text))
    return words.casefold() if fold_case else words


_LOOK_CLOSER = "\0"  # no character of a word, so nothing else becomes it


class _Table(dict[int, str]):
    """Code point -> what it becomes, made on first sight: the words of a crawl use few."""

    def __init__(self, fold_case: bool) -> None:
        self.fold_case = fold_case

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if _DELICATE.match(character):
            new = _LOOK_CLOSER  # what becomes of it depends on its neighbours
        elif not _WORD.match(character):
            new = " "
        else:
            new = character.casefold() if self.fold_case else character
        self[code] = new
        return new


_FOLD = {False: _Table(False), True: _Table(True)}

_SPACED = {**{mark: f" {mark} " for mark in ",.;:?!`"}, **dict.fromkeys("\t\n\r", " ")}
_TO_SPACE = re.compile(f"[{''.join(_SPACED)}]")


def metaclip_spaced(caption: str) -> str:
    """A caption as MetaCLIP v1 compares it: some marks between spaces, lines and tabs as spaces.

    All else stays: case, quotes, brackets, hyphens, and the double spaces that this makes.
    """
    return _TO_SPACE.sub(lambda found: _SPACED[found[0]], caption)


_PRINTABLE = re.compile(r"[ -%'-~]*")  # ASCII but "&"
# Bidirectional controls, invisible operators, the byte order mark, and controls but white space.
_CONTROL = (
    r"\x00-\x08\x0E-\x1B\x7F-\x9F\u061C\u200E\u200F\u202A-\u202E\u2060-\u206F\uFEFF\uFFF9-\uFFFB"
)
_CONTROLS = re.compile(rf"[{_CONTROL}]+")
# An ampersand escaped again and again: a round each would take the square of the text's length.
_AMPERSANDS = re.compile(
    r"&(?:amp;?|AMP;?|#0*38(?:;|(?![0-9]))|#[xX]0*26(?:;|(?![0-9a-fA-F]))){4,}"
)
_ENDLESS = re.compile(r"&#[0-9]{1000,};?")  # Python refuses such numbers
_SURROGATE = re.compile(r"[\uD800-\uDFFF]")
# UTF-8 read with a one-byte encoding shows as two characters at least, all from the alphabets that
# such encodings hold, the first two adjacent unless the second is a no-break space.
_MOJIBAKE = re.compile(r"[\x80-\x9F]|[\x80-\u2BFF\uF8FF\uFB01\uFB02\uFFFD]{2}|[ÂÃ] ")
_SUSPICIOUS = re.compile(rf"[&{_CONTROL}\uD800-\uDFFF]|{_MOJIBAKE.pattern}")


def clean(text: str) -> str:
    """`text` as it is stored: entities resolved, mojibake mended, NFC, one space between words.

    Control and bidirectional-override characters and lone surrogates are removed, so the result
    always encodes as UTF-8. Letters, case, punctuation and emoji stay. Idempotent; never raises.
    """
    if _PRINTABLE.fullmatch(text):
        return " ".join(text.split())
    text = " ".join(unicodedata.normalize("NFC", text).split())
    while _SUSPICIOUS.search(text) and (cleaned := _clean_closely(text)) != text:
        text = cleaned
    return text


def unescape(text: str) -> str:
    """`text` with its HTML entities resolved, once; never raises, as `html.unescape` does."""
    return html.unescape(_ENDLESS.sub("\ufffd", text))


def _clean_closely(text: str) -> str:
    text = unescape(_AMPERSANDS.sub("&", text))
    if _SURROGATE.search(text):  # halves that belong together become their character
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
    if _MOJIBAKE.search(text):
        text = _mend()(text)
    text = _CONTROLS.sub("", " ".join(text.split()))
    return " ".join(unicodedata.normalize("NFC", text).split())


@functools.cache
def _mend() -> Callable[[str], str]:
    """ftfy's repair of text that was decoded with the wrong encoding."""
    import ftfy

    mend: Callable[[str], str] = ftfy.fix_encoding
    return mend
