"""Both forms of a text: golden table, and laws that hold for every string."""

from __future__ import annotations

import unicodedata

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataset_build import text as text_module
from dataset_build.text import TextSettings, clean, metaclip_spaced, normalise
from tests.many_texts import check_drawn, check_evil

# Lone surrogates too: JSON and broken decoders bring them.
ANY_TEXT = st.text(st.characters(exclude_categories=())) | st.text(
    "aAéİßΐǰ犬カが゛ﾞไทย่ \u0301\u00ad&#;x0amplt\x00\x92Ã©â€™"
)


def contains(query: str, caption: str) -> bool:
    return f" {normalise(query)} " in f" {normalise(caption)} "


@pytest.mark.parametrize(
    ("query", "caption"),
    [
        ("St. Louis", "the St. Louis arch"),
        ("St Louis", "the st. louis, arch"),
        ("dog", 'a "dog" here'),
        ("dog", "dog."),
        ("New York", "New  York\tCity"),
        ("New York", "New-York"),
        ("Washington, D.C.", "in Washington D.C. today"),
        ("O'Brien", "Mr O\u2019Brien"),
        ("don't", "DON\u2019T PANIC"),
        ("AC/DC", "an AC DC concert"),
        ("strasse", "Hauptstraße Straße"),
        ("café", "cafe\u0301 au lait"),
        ("fig", "a ﬁg"),
        ("ABC 12", "\uff21\uff22\uff23\u3000\uff11\uff12"),
        ("hyphen", "hy\u00adphen"),
        ("heart", "I ❤\ufe0f heart"),
        ("犬", "白い犬と猫"),
        ("東京", "東京タワー"),
        ("ラーメン", "ﾗｰﾒﾝ屋"),
        ("แมว", "แมวน่ารัก"),
        ("собака", "БОЛЬШАЯ СОБАКА!"),
    ],
)
def test_query_is_found(query: str, caption: str) -> None:
    assert contains(query, caption)


@pytest.mark.parametrize(
    ("query", "caption"),
    [
        ("dog", "dogs and hotdog"),
        ("New York", "new yorkshire"),
        ("犬", "a dog"),
        ("cafe", "café"),
        ("กา", "ก่า"),
        ("서울", "서울에서"),
    ],
)
def test_query_is_not_found(query: str, caption: str) -> None:
    assert not contains(query, caption)


@pytest.mark.parametrize(
    ("caption", "spaced"),
    [
        ("Hello, world.", "Hello ,  world . "),
        ("a.b;c:d?e!f`g", "a . b ; c : d ? e ! f ` g"),
        ("..", " .  . "),
        ("a\tb\nc\r\nd", "a b c  d"),
        ('It\'s  (a) "New-York" CAFÉ/犬\u00a0\u3002', 'It\'s  (a) "New-York" CAFÉ/犬\u00a0\u3002'),
        ("", ""),
    ],
)
def test_metaclip_spaces_these_marks_and_nothing_else(caption: str, spaced: str) -> None:
    assert metaclip_spaced(caption) == spaced


def test_the_version_of_the_rules_is_part_of_what_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = TextSettings().identity()
    assert before == {"fold_case": True, "norm_id": text_module.NORM_ID}
    monkeypatch.setattr(text_module, "NORM_ID", "other")
    assert TextSettings().identity() != before


def test_case_is_kept_on_request() -> None:
    assert normalise("Apple-Straße, İ", fold_case=False) == "Apple Straße İ"
    assert normalise("Apple", fold_case=False) != normalise("apple", fold_case=False)


@pytest.mark.parametrize(
    ("raw", "stored"),
    [
        ("  a\n\tb\u00a0 c\u2028d ", "a b c d"),
        ("Tom &amp;amp; Jerry &lt;3 &eacute;", "Tom & Jerry <3 é"),
        ("donâ€™t", "don\u2019t"),
        ("voilÃ\u00a0 le cafÃ©", "voilà le café"),
        ("it\x92s", "it\u2019s"),
        ("e\u0301", "é"),
        ("a\u202eb\u200f\ufeff\x00\x1bc", "abc"),
        ("\ud83d\ude00 \ud800x", "😀 x"),
        ("&#xD83D; R&D AT&T", "\ufffd R&D AT&T"),
        ("“Naïve” \u2013 100 % ﬁne™ 👩\u200d🚀", "“Naïve” \u2013 100 % ﬁne™ 👩\u200d🚀"),
        ("Ângela e João", "Ângela e João"),
        ("", ""),
    ],
)
def test_clean(raw: str, stored: str) -> None:
    assert clean(raw) == stored


@pytest.mark.parametrize(
    ("raw", "stored"),
    [
        ("&" + "amp;" * 10_000 + "lt;", "<"),
        ("&" + "ampAMP;" * 10_000 + "eacute;", "é"),
        ("&" + "#38;#0038;#x26;#X0026;" * 3000 + "#x381;", "\u0381"),
        ("a &#" + "0" * 5000 + "38; b", "a \ufffd b"),
        ("&" + "amp;" * 100 + "#" + "9" * 5000, "\ufffd"),
    ],
)
def test_entities_without_end(raw: str, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a few rounds, not one a level: a round takes time for the whole text."""
    rounds: list[str] = []
    closely = text_module._clean_closely
    monkeypatch.setattr(
        text_module, "_clean_closely", lambda text: rounds.append(text) or closely(text)
    )
    assert clean(raw) == stored
    assert len(rounds) <= 4


@settings(deadline=None)
@given(ANY_TEXT)
@example("&amp;amp;amp;#38;lt;")
@example("&amp;amp;amp;amp;amp;#38;lt;")
@example("&#x26;#x202e;a")
@example("Ã\u0083Â©")
def test_clean_is_idempotent_and_encodes(raw: str) -> None:
    stored = clean(raw)
    assert clean(stored) == stored
    assert stored.encode("utf-8").decode() == stored
    assert unicodedata.is_normalized("NFC", stored)
    assert stored == " ".join(stored.split())


@settings(deadline=None)
@given(ANY_TEXT, st.booleans())
@example("a\u0345 犬\u0345 \u0345b", True)
def test_normalise_is_idempotent_and_of_words_only(raw: str, fold_case: bool) -> None:
    norm = normalise(raw, fold_case)
    assert normalise(norm, fold_case) == norm
    assert norm.encode("utf-8").decode() == norm
    assert norm == " ".join(norm.split())
    for word in norm.split():
        assert regex.fullmatch(r"[\p{L}\p{N}][\p{L}\p{M}\p{N}]*", word)


@settings(deadline=None)
@given(ANY_TEXT)
@example("\u0345")
@example("\u03b1\u0345 犬\u0345")
def test_what_is_stored_compares_like_what_was_read(raw: str) -> None:
    """Cleaning a clean caption again, or changing its case, changes no comparison."""
    stored = clean(raw)
    assert normalise(clean(stored)) == normalise(stored)
    assert normalise(stored) == normalise(normalise(stored, fold_case=False))


@settings(deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_a_query_is_found_in_a_caption_made_of_it(query: str, other: str) -> None:
    assert contains(query, f"{other} {query}, {other}") or not normalise(query)


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_takes_the_same_way(raw: str) -> None:
    """The fast path agrees with the general one, reached by a character that is a boundary."""
    assert normalise(raw) == normalise(raw + "\u2014")
    assert normalise(raw, False) == normalise(raw + "\u2014", False)


def test_every_character_is_stable() -> None:
    for code in range(0x30000):
        around = f"a{chr(code)}B"
        norm = normalise(around)
        assert normalise(norm) == norm, hex(code)


def test_table_and_pattern_agree() -> None:
    """Texts without marks are split by a table; the pattern for delicate ones says the same."""
    for code in range(0x80, 0x30000):
        character = chr(code)
        if text_module._DELICATE.match(character):
            continue
        around = unicodedata.normalize("NFKC", f"a{character}B")
        if text_module._DELICATE.search(around):
            continue
        expected = " ".join(text_module._WORD.findall(around.casefold()))
        assert text_module._words(around, True) == expected, hex(code)


def test_many_texts() -> None:
    """A thousandth of what `python -m tests.many_texts 1000000` tries."""
    check_evil(700, 1)
    check_drawn(300, 1)
