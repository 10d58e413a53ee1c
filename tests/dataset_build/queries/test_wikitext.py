"""Wikitext becomes running text; broken markup costs words, never an error or the page."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_build.queries.wikitext import BREAK, plain_text, words
from dataset_build.text import normalise


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("'''Bold''' and ''italic''", "Bold and italic"),
        ("[[Dog]]s and [[Cat (animal)|cats]]", "Dogs and cats"),
        ("[[Dog#Breeds|]] [[:Category:Dogs|dogs]] [[de:Hund]]", ""),
        ("[[File:A.jpg|thumb|A [[dog|hound]] runs]] text", "A hound runs text"),
        ("[[Image:A.jpg|right|A map{{cite|x}}, 1900]]text", "A map, 1900 text"),
        ("[[File:A.jpg|thumb|x|alt=A dog]] [[image:b.png|thumb|200x80px]] text", "text"),
        ("[[File:A.jpg]] [[File:A.jpg|upright=1.2]] [[Media:A.ogg|hear it]] text", "text"),
        ("{{Infobox|name={{nowrap|x}}|y=[[z]]}} text", "text"),
        ("{{flag|}} text {{lang|de|[[Hund]]}}", "text"),
        ("{| class=wikitable\n| cell {{x|}}\n|} text", "text"),
        ("{{a|{|\n|x\n|}}} text", "text"),
        ("a<ref name=x>[http://x.example y]</ref> b<ref name=x /> c", "a b c"),
        ("<math>\\frac{a}{b}</math> x <gallery>\nFile:x\n</gallery>", "x"),
        (
            "<gallery mode=x>\nFile:a.jpg|A [[dog|hound]]\nb.png|alt=x|B {{c}}\n</gallery>",
            "A hound B",
        ),
        ("x <GALLERY>\nFile:a.jpg|A dog\n\n== Head ==\ntext", "x A dog == Head == text"),
        ("a <!-- hidden [[ --> b", "a b"),
        ("see [http://x.example the site] and https://y.example/z", "see the site] and"),
        (
            "see [//x.example the site], ftp://y.example/z or [ftp://y.example]",
            "see the site], or ]",
        ),
        ("5&nbsp;km &amp; 3 &lt; 4<br />x", "5 km & 3 < 4 x"),
        ("__NOTOC__ text", "text"),
        # Slips of real pages: what is not closed keeps its words, what is not open closes nothing.
        ("one {{two three", "one two three"),
        ("one }} two ]] three", "one two three"),
        ("one [[two {{three]] four", "one two four"),
        ("one <ref>two\n== Heading ==\nthree", "one == Heading == three"),
    ],
)
def test_plain_text(wikitext: str, text: str) -> None:
    if text:
        assert " ".join(plain_text(wikitext).split()) == text
    else:
        assert "Hund" not in plain_text(wikitext)


@pytest.mark.parametrize(
    ("wikitext", "parts"),
    [
        ("St. Louis, Missouri", ["st louis", "missouri"]),
        ("The dog barked. The cat (a tom) ran.", ["the dog barked", "the cat", "a tom", "ran"]),
        ("== Head ==\n* one\n* two words", ["head", "one", "two words"]),
        ("it\u2019s 3.5 \u00bd \u2014 \u201cCaf\u00c9\u201d", ["it s 3 5 1 2", "café"]),
        ("{{x}}\n\n", []),
    ],
)
def test_phrases_end_at_boundaries(wikitext: str, parts: list[str]) -> None:
    assert phrases(words(wikitext)) == parts


MARKS_AND_LETTERS = st.text("aBcdÉİßǰ犬か\u0301\u0338\u00ad\ufb01½.,=<(\u2014\u201c\n ")


def phrases(found: str) -> list[str]:
    """What stands between breaks."""
    parts = (" ".join(part.split()) for part in found.split(BREAK))
    return [part for part in parts if part]


@settings(deadline=None)
@given(st.text() | MARKS_AND_LETTERS, st.booleans())
def test_words_are_those_of_each_phrase_normalised(wikitext: str, fold_case: bool) -> None:
    """The pass over bytes of the whole page agrees with going phrase by phrase."""
    marks = r"[\n,;:!?()\[\]{}|=*#\"\u201c\u201d\u2013\u2014\u2026]|(?<=\w{4})\.(?=\s|\Z)"
    expected = [normalise(part, fold_case) for part in re.split(marks, plain_text(wikitext))]
    assert phrases(words(wikitext, fold_case)) == [part for part in expected if part]


@settings(deadline=None)
@given(st.text(st.sampled_from("[]{}|<>!-/refab =\n'&;:.\u00e9")))
def test_any_markup_gives_text(wikitext: str) -> None:
    text = plain_text(wikitext)
    assert set(text) <= set(wikitext) | set(" ") or "&" in wikitext


def test_deep_nesting_is_no_problem() -> None:
    deep = "{{a|" * 50_000 + "}}" * 50_000
    assert plain_text(f"one {deep} two").split() == ["one", "two"]
    assert plain_text("[[" * 50_000 + "word" + "}}" * 50_000).split() == ["word"]
    assert set(plain_text("[[a|" * 50_000 + "word" * 50_000 + "]]" * 50_000)) <= set("a|word")


def test_labels_of_links_in_links_are_copied_a_few_times_only() -> None:
    """Were it once a level, this would take a minute."""
    deep = "[[" * 500_000 + "x" * 2_000_000 + "]]" * 500_000
    assert plain_text(deep) == "x" * 2_000_000


@pytest.mark.parametrize("number", ["1" * 5000, "x" + "f" * 5000, "99999999"])
def test_entities_of_no_character_are_none(number: str) -> None:
    assert plain_text(f"one &#{number}; two") == "one \ufffd two"
