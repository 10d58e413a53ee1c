"""The rules for captions, one by one, and their exact accounting."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_build.extract import ExtractSettings, candidates
from dataset_build.extract.candidates import Candidates
from dataset_build.records import CANDIDATES
from dataset_build.text import clean

PICTURE = "http://a.example/x.jpg"


def judge(target: Path, text: str, url: str = PICTURE, **settings: object) -> str:
    """The reason why a pair is dropped; "" if it is kept."""
    out = Candidates(target, ExtractSettings(**settings), "s", "f")
    with out:
        out.row(url, text, "alt", "")
    assert out.stats.balanced()
    return next(iter(out.stats.dropped), "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a brown dog", ""),
        ("\u200f \u202e", "empty_text"),
        ("a d", "too_short"),
        ("12-34-56 789", "no_letter"),
        ("holiday in rome.JPG", "file_name"),
        ("see photo.png!", "file_name"),
        ("IMG 1234", "file_name"),
        ("DSC_0042 (2)", "file_name"),
        ("Screenshot 2020-01-01", "file_name"),
        ("photo No. 549", "file_name"),
        ("holiday_in_rome_3", "file_name"),
        ("Markus_Söder_5F9E", "file_name"),
        ("a dog in snake_case", ""),
        ("罗马假日_旅游", ""),
        ("photo of a dog", ""),
        ("image 1 of Rome", ""),
        ("https://a.example/some_page", "url_as_text"),
        ("www.a.example/page", "url_as_text"),
        ("see https://a.example/ for more", ""),
        ("Example.com", "url_as_text"),
        ("(photos.example.co.uk/a?b)", "url_as_text"),
        ("some.body+pictures@example.org", "url_as_text"),
        ("example.com in the rain", ""),
        ("Dr.Martens", ""),
        ("St.Louis", ""),
        ("Node.js", ""),
        ("<b>bold words</b>", "markup"),
        ("{{ product.title }} here", "markup"),
        ("[caption id=1] some words", "markup"),
        (r"{\displaystyle p_{ii}=0}", "markup"),
        (r"\mathbf {x} _{1},\dots ,\mathbf {x} _{N}", "markup"),
        (r"\sigma _{i}", "markup"),
        ("x_{i} and y_{j}", "markup"),
        ("I <3 dogs [2010]", ""),
        ("a dog {of mine} ^_^", ""),
        ("Facebook", "too_few_words"),
        ("Facebook!?", "too_few_words"),
        ("白い犬です。", ""),
    ],
)
def test_text(tmp_path: Path, text: str, reason: str) -> None:
    assert judge(tmp_path / "x.parquet", text) == reason


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://a.example/x", ""),
        ("http://a.example/logo.SVG?v=1", "denied_extension"),
        ("http://a.example/x.gif", "denied_extension"),
        ("data:image/png;base64,AAAA", "data_uri"),
        ("about:blank", "not_http"),
        ("http://", "bad_url"),
    ],
)
def test_address(tmp_path: Path, url: str, reason: str) -> None:
    assert judge(tmp_path / "x.parquet", "a brown dog", url) == reason


def test_settings_decide(tmp_path: Path) -> None:
    target = tmp_path / "x.parquet"
    assert judge(target, "Facebook", min_words=1) == ""
    assert judge(target, "a brown dog", min_chars=12) == "too_short"
    assert judge(target, "a brown dog", min_words=4) == "too_few_words"
    assert judge(target, "a brown dog", "http://a.example/x.gif", denied_extensions=[]) == ""
    assert judge(target, "a brown dog", denied_extensions=[".JPG"]) == "denied_extension"


def test_long_texts_end_at_a_word(tmp_path: Path) -> None:
    target = tmp_path / "x.parquet"
    with Candidates(target, ExtractSettings(max_chars=11), "s", "f") as out:
        out.row(PICTURE, "a brown dog and a cat", "alt", "")
        out.row(PICTURE, "a brown doggy", "alt", "")
        out.row(PICTURE, "a brown dog", "alt", "")
        out.row(PICTURE, "abcdefghijklmnopqrst", "alt", "")
        out.row(PICTURE, "a brown dog " * 100_000, "alt", "")
    assert pq.read_table(target)["text"].to_pylist() == [
        "a brown dog",
        "a brown",
        *["a brown dog"] * 2,
    ]
    assert out.stats.counts["texts_cut"] == 4
    assert out.stats.dropped == {"too_few_words": 1}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("犬" * 30, "犬" * 20),
        ("犬の 写真、" + "犬" * 30, "犬の 写真、" + "犬" * 14),
        ("犬" * 15 + " " + "犬" * 30, "犬" * 15 + " " + "犬" * 4),
        ("a dog " + "犬" * 30, "a dog " + "犬" * 14),
        ("a dog or two, and Krungthepmahanakhon", "a dog or two, and"),
        ("a Krungthepmahanakhon dog", "a Krungthepmahanakho"),
        # A letter keeps its marks: here two after each, or one; those of one may be too many.
        ("กี่" * 30, "กี่" * 6),
        ("a " + "x\u0301\u0323" * 30, "a " + "x\u0323\u0301" * 6),
        ("ab " + "x\u0301" * 300, "ab " + "x\u0301" * 8),
        ("a x" + "\u0301" * 300, "a x" + "\u0301" * 17),
        ("a dog " + "👩\u200d👩\u200d👧" * 9, "a dog " + "👩\u200d👩\u200d👧" * 2),
    ],
    ids=[
        *("han", "han early space", "han late space", "latin and han", "late word", "long word"),
        *("thai", "two marks", "one mark", "too many marks", "joined"),
    ],
)
def test_long_texts_of_any_script_are_kept(tmp_path: Path, text: str, kept: str) -> None:
    target = tmp_path / "x.parquet"
    with Candidates(target, ExtractSettings(max_chars=20, min_words=1), "s", "f") as out:
        out.row(PICTURE, text, "alt", "")
    assert pq.read_table(target)["text"].to_pylist() == [kept]


@given(
    st.lists(st.sampled_from([*"ab 犬กีé&;#x\u0301\u0323\u200d👩🏽ÃŸÂ©가ᄀ ", "&amp"]), min_size=30)
    .map("".join)
    .filter(lambda text: len(clean(text)) > 20)
)
def test_what_is_cut_stays_as_it_is(text: str) -> None:
    kept = candidates._shortened(clean(text), 20)
    assert 0 < len(kept) <= 20
    assert clean(kept) == kept
    assert unicodedata.is_normalized("NFC", kept)


def test_of_a_text_without_end_no_more_is_cleaned_than_can_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(candidates, "_clean", lambda raw: lengths.append(len(raw)) or clean(raw))
    with Candidates(tmp_path / "x.parquet", ExtractSettings(max_chars=100), "s", "f") as out:
        out.row(PICTURE, "a brown dog " * 100_000, "alt", "")
        out.row(PICTURE, "&#x72AC;" * 1000, "alt", "")
    assert lengths == [out.max_raw_chars] * 2
    assert pq.read_table(tmp_path / "x.parquet")["text"].to_pylist()[1] == "犬" * 100


def test_row_groups_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_ROW_GROUP", 10)
    target = tmp_path / "x.parquet"
    with Candidates(target, ExtractSettings(), "snap", "file") as out:
        for number in range(25):
            out.row(f"http://a.example/{number}.jpg", f"dog number {number}", "alt", "http://p/")
    with pq.ParquetFile(target) as parquet:
        assert parquet.schema_arrow.equals(CANDIDATES)
        assert [parquet.metadata.row_group(i).num_rows for i in range(3)] == [10, 10, 5]
    assert out.stats.histograms["source"] == {"alt": 25}


def test_no_row_still_is_a_file(tmp_path: Path) -> None:
    with Candidates(tmp_path / "x.parquet", ExtractSettings(), "s", "f"):
        pass
    assert pq.read_table(tmp_path / "x.parquet").num_rows == 0
