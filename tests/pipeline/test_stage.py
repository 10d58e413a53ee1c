"""Which files a pattern names, and what is said where it names none."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import files
from pipeline.config import MissingInput, Settings
from pipeline.stage import Run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in ("a.csv", "B.CSV", "c.txt", "[d].txt", "e:f.txt", "below/g.csv"):
        path = tmp_path / "here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path / "here")
    return Run(tmp_path / "run", Settings())


def test_a_folder_stands_for_its_files_of_a_kind(run: Run) -> None:
    assert run.find(".", (".csv",)) == ["B.CSV", "a.csv", "below/g.csv"]
    assert run.find("*.csv") == ["a.csv"]


@pytest.mark.parametrize(
    ("pattern", "endings", "said"),
    [
        ("nothing", (), "nothing: no such input; check the path in the configuration"),
        ("below", (), "below: a folder; name the files in it, as with /*"),
        ("below", (".x", ".y"), "below: no file in it ends in .x, .y"),
        ("[d].txt", (), "[d].txt: its brackets are read as a pattern; write [[] for each that"),
        ("e:f.txt", (), "e:f.txt: before the colon stands the name of a stage; if this is a file"),
        ("e:none.txt", (), "e:none.txt: no such input"),
    ],
)
def test_why_there_is_none(run: Run, pattern: str, endings: tuple[str, ...], said: str) -> None:
    with pytest.raises(MissingInput) as error:
        run.find(pattern, endings)
    assert str(error.value).startswith(said)


def test_what_is_said_helps(run: Run) -> None:
    assert run.find("[[]d].txt") == ["[d].txt"]
    assert [Path(found) for found in run.find("./e:f.txt")] == [Path("e:f.txt")]


def test_files_of_several_names_are_one(run: Run, tmp_path: Path) -> None:
    names = ["a.csv", "./a.csv", f"{tmp_path}/here/a.csv", "below/../a.csv", "c.txt"]
    assert files.distinct(names) == ["a.csv", "c.txt"]
    others = ["https://x.example/a//b", "https://x.example/a/b", "stage:a.csv", "stage:a.csv"]
    assert files.distinct(others) == others[:3]
