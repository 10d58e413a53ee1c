"""Captions are kept by their language, as a function says that the settings name."""

from __future__ import annotations

import gzip
import os
import random
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from dataset_build import functions, language
from dataset_build.extract import ExtractSettings, candidates, plan
from pipeline.config import ConfigError
from pipeline.stage import Run

from .conftest import Extract, Root, members, metadata

MODULE = """
def codes(texts):
    assert len(set(texts)) == len(texts)
    return ["de" if "Hund" in text else "" if "Anna" in text else "en" for text in texts]

def wrong(texts):
    return [text.nothing for text in texts]

def too_few(texts):
    return ["en"] * (len(texts) - 1)

def no_list(texts):
    return None

def numbers(texts):
    return [0 for text in texts]

def given_back(texts):
    return texts
"""
TEXTS = [
    *("a brown dog", "ein brauner Hund", "Anna Berg", "a brown dog"),
    *("a white cat", "der Hund bellt", "a red bird"),
]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The functions above, importable."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_languages", raising=False)  # another test's
    (path := tmp_path / "my_languages.py").write_text(MODULE)
    return path


@pytest.fixture
def wat(tmp_path: Path) -> str:
    """A page with a picture for each of the texts, and one without any."""
    images = [{"url": f"/{number}.jpg", "alt": text} for number, text in enumerate(TEXTS)]
    page = metadata("http://p.example/", [*images, {"url": "/none.jpg"}])
    (path := tmp_path / "a.warc.wat.gz").write_bytes(b"".join(members(page)))
    return str(path)


@pytest.mark.parametrize("rows", [2, 3, 1 << 16])
@pytest.mark.parametrize("languages", [("en",), ("en", ""), ("de",), ("fr",)])
def test_captions_of_other_languages_are_dropped_and_counted(
    extract: Extract,
    module: Path,
    wat: str,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    languages: tuple[str, ...],
) -> None:
    monkeypatch.setattr(candidates, "_ROW_GROUP", rows)
    kept, stats = extract(wat=[wat], language="my_languages:codes", languages=languages)
    told = {"en": 4, "": 1, "de": 2, "fr": 0}
    many = sum(told[code] for code in languages)
    wanted = {"en": ("a ",), "": ("Anna",), "de": ("ein", "der"), "fr": ()}
    starts = tuple(start for code in languages for start in wanted[code])
    assert [row["text"] for row in kept] == [text for text in TEXTS if text.startswith(starts)]
    assert stats.rows_in == len(TEXTS) + 1 and stats.rows_out == many
    assert stats.dropped == {"no_text": 1, "other_language": len(TEXTS) - many}
    assert stats.balanced()
    assert stats.histograms["language"] == {"en": 4, "unknown": 1, "de": 2}
    assert stats.histograms.get("source", {}) == ({"alt": many} if many else {})


def test_without_a_function_all_are_kept(extract: Extract, wat: str) -> None:
    kept, stats = extract(wat=[wat])
    assert [row["text"] for row in kept] == TEXTS
    assert stats.rows_out == len(TEXTS) and stats.balanced()
    assert "language" not in stats.histograms


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("wrong", "its function failed: AttributeError: .*nothing"),
        ("too_few", "its function returned 5 codes for 6 texts"),
        ("no_list", "its function failed: TypeError: "),
        ("numbers", "its function returned 0, no code of a language"),
        ("given_back", "its function returned 'a brown dog', no code"),
        ("missing", "has .*codes.* but not 'missing'"),
    ],
)
def test_a_function_that_cannot_be_used_is_named(
    extract: Extract, module: Path, wat: str, function: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^extract\.language: .*{message}"):
        extract(wat=[wat], language=f"my_languages:{function}")


def test_another_function_of_the_same_name_makes_other_tasks(
    module: Path, wat: str, tmp_path: Path
) -> None:
    settings = ExtractSettings(wat=(wat,), language="my_languages:codes")
    run = Run(tmp_path / "run", Root(extract=settings))
    before = plan(run)
    assert plan(run) == before
    module.write_text(MODULE.replace("Hund", "Katze"))
    assert plan(run)[0].params["language"] != before[0].params["language"]


def test_languages_that_nothing_tells_apart_are_an_error() -> None:
    with pytest.raises(ValidationError, match=r"set extract\.language as well"):
        ExtractSettings(languages=("fr",))


@pytest.mark.parametrize(
    "wrong", [{"languages": ["English"]}, {"languages": []}, {"language": "my_languages"}]
)
def test_settings_that_would_keep_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ExtractSettings.model_validate(wrong)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    function = "dataset_build.language:codes"
    planned = functions.identity("extract.language", function)
    monkeypatch.delitem(sys.modules, "dataset_build.language")
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ConfigError, match=r"extract\.language: .*pip install -e '\.\[language\]'"):
        functions.load("extract.language", function, planned)


def test_the_function_that_comes_with_it_tells_languages(extract: Extract, wat: str) -> None:
    texts = {
        "A DOG RUNS OVER THE GREEN GRASS": "en",
        "Ein Hund läuft über das grüne Gras": "de",
        "白い犬が草の上を走っている。": "ja",
        "3719017725_8c14405266 1024x768": "zxx",
        "Matthew Humphries": "",
    }
    assert language.codes(list(texts)) == list(texts.values())
    _, stats = extract(wat=[wat], language="dataset_build.language:codes", languages=["en"])
    assert stats.dropped["other_language"] > 0 and stats.balanced()


def test_captions_written_by_people_are_english() -> None:
    if not (data := os.environ.get("OPENWIT_DATA")):
        pytest.skip("OPENWIT_DATA is not set: no real captions")
    with gzip.open(f"{data}/captions/flickr8k.token.txt.gz", "rt") as lines:
        captions = [line.partition("\t")[2].strip() for line in lines]
    codes = language.codes(random.Random(0).sample(captions, 1000))
    assert codes.count("en") > 970
    assert sum(code not in ("en", "") for code in codes) < 10
