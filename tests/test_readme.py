"""The README is true: its tree is the tree on disk, its targets and settings exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def readme_tree() -> set[str]:
    """Paths named by the annotated tree: two spaces of indent a level, folders end with a slash."""
    block = re.search(r"```text tree\n(.*?)```", README, re.DOTALL)
    assert block, "the README has no annotated tree"
    found: set[str] = set()
    stack: list[str] = []
    for line in block[1].splitlines():
        if not line.strip():
            continue
        level = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        stack[level:] = [name.rstrip("/")]
        found.add("/".join(stack) + ("/" if name.endswith("/") else ""))
    return found


def disk_tree() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    found: set[str] = set()
    for path in listed:
        if not (ROOT / path).exists() or path.endswith("__init__.py"):
            continue
        parts = path.split("/")
        found |= {"/".join(parts[:depth]) + "/" for depth in range(1, len(parts))}
        found.add(path)
    return found


def test_the_tree_is_the_tree_on_disk() -> None:
    disk = {path for path in disk_tree() if not path.startswith("tests/") or path == "tests/"}
    said = {path for path in readme_tree() if not path.startswith("tests/") or path == "tests/"}
    assert said - disk == set(), "in the README, not on disk"
    assert disk - said == set(), "on disk, not in the README"


def test_its_example_makes_a_dataset_to_evaluate_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.evaluate.zero_shot import open_dataset

    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example
    for name in ("cat/1", "dog/1", "dog/2"):
        path = tmp_path / "pictures" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path)
    exec(example[1], {})
    dataset = open_dataset("mine", [Path("mine.parquet")])
    assert (dataset.classes, len(dataset.templates)) == (("cat", "dog"), 2)
    assert list(dataset.batches(9)) == [([b"cat/1", b"dog/1", b"dog/2"], [0, 1, 1])]


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z][a-z-]+)", README))
    assert named <= targets, named - targets
    assert {"demo", "test", "build-dataset", "train", "evaluate", "report"} <= named
