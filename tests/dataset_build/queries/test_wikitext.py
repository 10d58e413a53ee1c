"""Wikitext becomes running text; broken markup costs words, never an error or the page."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_build.queries.wikitext import phrases, plain_text


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
        ("St. Louis, Missouri", ["St. Louis", " Missouri"]),
        ("The dog barked. The cat (a tom) ran.", ["The dog barked", " The cat ", "a tom", " ran."]),
        ("== Head ==\n* one\n* two words", [" Head ", " one", " two words"]),
        ("{{x}}\n\n", []),
    ],
)
def test_phrases_end_at_boundaries(wikitext: str, parts: list[str]) -> None:
    assert list(phrases(wikitext)) == parts


@settings(deadline=None)
@given(st.text(st.sampled_from("[]{}|<>!-/refab =\n'&;:.\u00e9")))
def test_any_markup_gives_text(wikitext: str) -> None:
    text = plain_text(wikitext)
    assert "{{" not in text or "{" in wikitext
    assert set(text) <= set(wikitext) | set(" ") or "&" in wikitext


def test_deep_nesting_is_no_problem() -> None:
    deep = "{{a|" * 50_000 + "}}" * 50_000
    assert plain_text(f"one {deep} two").split() == ["one", "two"]
    assert plain_text("[[" * 50_000 + "word" + "}}" * 50_000).split() == ["word"]
