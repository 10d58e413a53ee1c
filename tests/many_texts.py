"""The laws of stored and compared texts, on as many texts as asked for.

`python -m tests.many_texts 1000000 [SEED]` tries half of them as hypothesis draws them and half
made to be evil: pieces of surrogates, combining marks, entities, mojibake, bidirectional controls,
joiners, tags and noncharacters, in any order. A failure prints the text. Noncharacters stay in
texts: they are valid in UTF-8 (Unicode Corrigendum #9).
"""

from __future__ import annotations

import random
import sys
import time
import unicodedata

import regex
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dataset_build.text import clean, normalise

# Code points of a kind: a text takes a few kinds, so that those of one kind meet each other.
KINDS = {
    "ascii": [*range(0x20, 0x7F)],
    "control": [*range(0x20), *range(0x7F, 0xA0)],
    "latin": [*range(0xA0, 0x250)],
    "surrogate": [*range(0xD800, 0xE000)],
    "mark": [*range(0x300, 0x370), *range(0x1AB0, 0x1AC0), 0x345, 0x20D0, 0x20E3, 0x3099, 0x309A],
    "greek": [*range(0x370, 0x400), *range(0x1F00, 0x2000)],
    "composed": [*range(0xF900, 0xFB50), *range(0xFE30, 0xFF00), *range(0x2F800, 0x2FA20)],
    "invisible": [0xAD, 0x34F, 0x61C, *range(0x200B, 0x2010), *range(0x202A, 0x202F),
                  *range(0x2060, 0x2070), *range(0xFE00, 0xFE10), 0xFEFF, *range(0xFFF9, 0xFFFE)],
    "tag": [*range(0xE0000, 0xE0080), *range(0xE0100, 0xE01F0)],
    "nonchar": [*range(0xFDD0, 0xFDF0), *range(0xFFFE, 0x110000, 1 << 16)],
    "unspaced": [*range(0xE00, 0xE80), *range(0x1780, 0x17F0),
                 *range(0x3040, 0x3100), *range(0x4E00, 0x4F00)],
    "hangul": [*range(0x1100, 0x1200), *range(0xAC00, 0xAC80), *range(0x3130, 0x3190)],
    "joined": [*range(0x600, 0x700), *range(0x900, 0x980), *range(0xB80, 0xC00),
               *range(0xD00, 0xD80)],
    "emoji": [*range(0x1F1E6, 0x1F200), *range(0x1F3FB, 0x1F400), *range(0x1F600, 0x1F650), 0x200D],
    "private": [*range(0xE000, 0xE010), 0xF8FF, 0xFFFD, *range(0xF0000, 0xF0010)],
    "any": [*range(0, 0x110000, 7)],
}  # fmt: skip
PIECES = (
    "&amp;", "&amp;amp;lt;", "&#x202e;", "&#xd83d;&#xde00;", "&#0;", "&#x80;", "&#xffff;",
    "&#38;#x61;", "&eacute", "&NotEqualTilde;", "&ngE;", "&", "#", "x", ";", "Ã©", "â€™",
    "Ã\u0083Â©", "Ð\xb4Ð°", "ï»¿",
    "\ud83d", "\ude00", "\u00a0", "\u2028", "\u3000", "\x85", "\x1c", "\ufb01", "\u01f0", "\u0130",
    "\u1e9e", "\u0390", "<b>", "http://", ".jpg", " ",
)  # fmt: skip
_ENCODINGS = ("latin-1", "cp1252", "cp1251", "cp437", "macroman", "cp1250")


def evil(draw: random.Random) -> str:
    """A text of up to some forty pieces, perhaps read with the wrong encoding or escaped."""
    kinds = [KINDS[name] for name in draw.sample(list(KINDS), draw.randint(1, 3))]
    parts = [
        draw.choice(PIECES) if draw.random() < 0.3 else chr(draw.choice(draw.choice(kinds)))
        for _ in range(draw.randint(0, 40))
    ]
    text = "".join(parts)
    way = draw.random()
    if way < 0.25:  # mojibake
        read = text.encode("utf-8", "surrogatepass").decode(draw.choice(_ENCODINGS), "ignore")
        return read[: draw.randint(0, len(read))]
    if way < 0.35:
        return "".join(f"&#{ord(c)};" for c in text)
    return text


_WORDS = regex.compile(r"[\p{L}\p{M}\p{N} ]*")  # not unicodedata: its Unicode may be older


def check(raw: str) -> None:
    """Raise AssertionError if a law does not hold for this text."""
    stored = clean(raw)
    assert clean(stored) == stored, ascii(raw)
    assert unicodedata.is_normalized("NFC", stored), ascii(raw)
    assert stored.encode().decode() == stored, ascii(raw)
    assert " ".join(stored.split()) == stored, ascii(raw)
    assert not any(unicodedata.category(c) in {"Cc", "Cs"} for c in stored), ascii(raw)
    for fold_case in (True, False):
        for text in (raw, stored):
            norm = normalise(text, fold_case)
            assert normalise(norm, fold_case) == norm, ascii(raw)
            assert norm.encode().decode() == norm, ascii(raw)
            assert unicodedata.is_normalized("NFKC", norm), ascii(raw)
            assert _WORDS.fullmatch(norm), ascii(raw)


def check_evil(count: int, number: int) -> None:
    """`check` so many texts of `evil`, the same ones for the same number."""
    draw = random.Random(number)
    for _ in range(count):
        check(evil(draw))


def check_drawn(count: int, number: int) -> None:
    """`check` so many texts as hypothesis draws them, all of Unicode and our pieces."""
    texts = st.text(st.characters(exclude_categories=())) | st.lists(
        st.sampled_from(PIECES) | st.characters(exclude_categories=())
    ).map("".join)
    options = settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    seed(number)(options(given(texts)(check)))()


def main(arguments: list[str]) -> None:
    """Check as many texts as the command line says, in steps of which each is printed."""
    count, number = int(arguments[0]), int(arguments[1]) if arguments[1:] else 0
    start, done, step = time.monotonic(), 0, 50_000
    while done < count:
        now = min(step, count - done)
        check_evil(now - now // 2, number)
        check_drawn(now // 2, number)
        done, number = done + now, number + 1
        print(f"{done} texts hold, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
