"""Functions of the user's choice, as they are looked for before anything is run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataset_build import functions
from pipeline.config import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One that modules are imported from; those of the test begin with `mine`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("mine")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "source",
    [
        "def codes(): ...",
        "class codes: ...",
        "import os as codes",
        "from os import path as codes",
        "codes = 1",
        "codes: int = 1",
        "codes, other = 1, 2",
        "(a, [b, *codes]) = 1, (2, 3)",
        "if 0:\n  pass\nelse:\n  codes = 1",
        "try:\n  pass\nexcept ImportError:\n  pass\nelse:\n  def codes(): ...",
        "with open('x') as f:\n  def codes(): ...",
        "with open('x') as codes:\n  pass",
        "for i in []:\n  codes = i",
        "for codes in []:\n  pass",
        "while 0:\n  def codes(): ...",
        "match 1:\n  case codes: pass",
        "print(codes := 1)",
        "from os.path import *",  # the module would have to be run to tell
        "# coding: latin-1\n# \xe4\ncodes = 1",
    ],
)
def test_a_name_is_found_however_it_is_bound(source: str, folder: Path) -> None:
    (folder / "mine.py").write_bytes(source.encode("latin-1"))
    assert len(functions.identity("a.setting", "mine:codes")) == 64


@pytest.mark.parametrize(
    "source",
    [
        "def other():\n  codes = 1",
        "class Other:\n  codes = 1",
        "print(codes)",
        "other.codes = 1",
        "import codes.path as other",
        "[codes for codes in []]",
    ],
)
def test_a_name_that_is_bound_elsewhere_is_none_of_the_module(source: str, folder: Path) -> None:
    (folder / "mine.py").write_text(source)
    with pytest.raises(ConfigError, match=r"^a\.setting: 'mine:codes': .*but not 'codes'"):
        functions.identity("a.setting", "mine:codes")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"def codes(:\n", "cannot be read as Python: invalid syntax"),
        (b"codes = 1\0", "cannot be read as Python: .*null bytes"),
        (b"\n\ncodes = '\xff'\n", "cannot be read as Python: .*utf-8"),
        (b"# coding: klingon\ncodes = 1\n", "cannot be read as Python: unknown encoding"),
    ],
)
def test_a_module_that_is_no_python_is_named(content: bytes, message: str, folder: Path) -> None:
    (folder / "mine.py").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^a\.setting: 'mine:codes': .*mine\.py {message}"):
        functions.identity("a.setting", "mine:codes")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("mine.part:codes", "cannot be found: RuntimeError: no luck"),
        ("__main__.x:codes", "__main__"),
        (".mine:codes", "install it, or run from"),
        ("mine..part:codes", "no luck"),
        ("nowhere_at_all:codes", "no module 'nowhere_at_all'"),
        ("mine", "not of the form"),
        ("sys:path", "no module 'sys' in Python is there"),
    ],
)
def test_a_module_that_is_not_found_is_named(function: str, message: str, folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine/__init__.py").write_text("raise RuntimeError('no luck')")
    (folder / "mine/part.py").write_text("codes = 1")
    with pytest.raises(ConfigError, match=rf"^a\.setting: '{function}'.*{message}"):
        functions.identity("a.setting", function)


def test_a_main_module_without_a_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    with pytest.raises(ConfigError, match=r"'__main__:x': cannot be found: ValueError: "):
        functions.identity("a.setting", "__main__:x")


def test_a_module_is_not_run_to_be_found(folder: Path) -> None:
    (folder / "mine.py").write_text("raise RuntimeError('run')\ndef codes(): ...\n")
    functions.identity("a.setting", "mine:codes")


def test_what_was_planned_is_what_is_loaded(folder: Path) -> None:
    (folder / "mine.py").write_text("def codes(): return 1\n")
    planned = functions.identity("a.setting", "mine:codes")
    assert functions.load("a.setting", "mine:codes", planned)() == 1
    (folder / "mine.py").write_text("def codes(): return 2\n")
    with pytest.raises(ConfigError, match=r"^a\.setting: mine:codes has changed; start the build"):
        functions.load("a.setting", "mine:codes", planned)


def test_what_another_module_should_have_had_is_told_when_it_is_loaded(folder: Path) -> None:
    (folder / "mine.py").write_text("from os.path import *\n")
    planned = functions.identity("a.setting", "mine:codes")
    with pytest.raises(ConfigError, match=r"^a\.setting: its function failed: AttributeError: "):
        functions.load("a.setting", "mine:codes", planned)
