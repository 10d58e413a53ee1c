"""Who may import whom: the core imports nobody here, the four packages never each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("dataset_build", "train", "slurm", "sample_web")
LOOK_UPWARD = {
    "pipeline/recipe.py",
    *(f"pipeline/commands/{name}.py" for name in ("advance", "look", "plan", "purge", "verify")),
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("package", ["pipeline", *PACKAGES])
def test_packages_import_only_below_themselves(package: str) -> None:
    allowed = {package, "pipeline"}
    for path in (ROOT / package).rglob("*.py"):
        if path.relative_to(ROOT).as_posix() not in LOOK_UPWARD:
            strangers = imported(path) & {"pipeline", *PACKAGES, "benchmarks", "tests"} - allowed
            assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"


HEAVY = ("torch", "open_clip", "img2dataset", "cv2", "albumentations", "polars", "fastwarc", "ftfy")


@pytest.mark.parametrize("module", ["pipeline.__main__", "pipeline.recipe"])
def test_the_command_line_starts_without_the_heavy_libraries(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_parquet_files_are_opened_in_one_way() -> None:
    opening = [
        path.relative_to(ROOT).as_posix()
        for package in ("pipeline", *PACKAGES)
        for path in (ROOT / package).rglob("*.py")
        if "ParquetFile(" in path.read_text()
    ]
    assert opening == ["pipeline/files.py"]


def test_tars_of_samples_are_read_in_one_way() -> None:
    """By `pipeline.tar`: libraries read damaged ones in silence."""
    strangers = {
        path.relative_to(ROOT).as_posix()
        for package in ("pipeline", *PACKAGES)
        for path in (ROOT / package).rglob("*.py")
        if imported(path) & {"tarfile", "webdataset"}
    }
    assert strangers <= {
        "sample_web/labelled.py",  # an archive of pictures that the user has, compressed
    }
