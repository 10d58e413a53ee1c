"""What differs by now from what was published."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from pipeline import files
from pipeline.manifest import Manifest, stored


def damage(stage_folder: Path, manifest: Manifest) -> list[str]:
    """What of a manifest's outputs differs from what was published, one sentence a file.

    What builds read is looked at; a file is called by its stable name if it has it.
    """
    faults = []
    for output in manifest.outputs:
        path = stored(stage_folder, manifest, output)
        shown = stage_folder / "out" / output.name
        name = shown if _is_same(path, shown) else path
        if what := _difference(path, output.bytes, {output.sha256}):
            faults.append(f"{name}: {what}")
    return faults


def astray(
    stage_folder: Path, manifest: Manifest, digests: Mapping[Path, Collection[str]]
) -> dict[str, str]:
    """By name, what is wrong with the files of a manifest's outputs below `out/` that are files of
    their own, as in a copy that knows no second names; `expose` puts that right.

    `digests`: what each may hold; while a stage is made anew, some are of the new tasks already.
    """
    faults = {}
    for output in manifest.outputs:
        shown = stage_folder / "out" / output.name
        if _is_same(stored(stage_folder, manifest, output), shown):
            continue
        if what := _difference(shown, None, digests[shown]):
            faults[output.name] = f"{shown}: {what}"
    return faults


def _is_same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:
        return False


def _difference(path: Path, size: int | None, digests: Collection[str]) -> str:
    """How a file differs from all that was published; empty if it does not."""
    try:
        if size is not None and (found := path.stat().st_size) != size:
            return f"{found} bytes, published with {size}"
        return "" if files.sha256(path) in digests else "its bytes differ from those published"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
