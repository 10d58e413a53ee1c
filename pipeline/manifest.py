"""What a finished task leaves behind, and the one way in which it is published.

A task is done iff its manifest exists, carries the planned fingerprint, and its outputs verify.
Protocol: the attempt writes into a folder that only it has; every file is forced to the disk, read
back and checked; then one `link()` publishes the manifest. Losing that race is harmless.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline import files, formats, memory
from pipeline.stats import Stats

REMOVED = "removed.txt"
"""Below `out/`: what was removed from the outputs since; no task publishes it, and it stays."""


@dataclass(frozen=True)
class Output:
    """One published file."""

    name: str
    """Its path below the stage's `out/`."""
    bytes: int
    sha256: str
    rows: int | None
    """Parquet rows or tar members; None for other formats."""


@dataclass(frozen=True)
class Manifest:
    """The record of a finished task; its file is the only proof that the task is done."""

    stage: str
    index: int
    fingerprint: str
    store: str
    """Folder below `RUN/<stage>/store/` that holds the outputs."""
    outputs: tuple[Output, ...]
    stats: Stats
    seconds: float
    memory_mb: float
    """Most memory that the process which made it ever held, MiB; what it maps counts too."""
    finished: float
    """Unix time, seconds; for people, never compared."""
    host: str
    job: str
    attempt: int

    def to_json(self) -> str:
        """The manifest file's text."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["outputs"] = [asdict(output) for output in self.outputs]
        values["stats"] = self.stats.to_json()
        return json.dumps(values, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Inverse of `to_json`. Raises ValueError or KeyError on anything else."""
        values = json.loads(text)
        outputs = tuple(Output(**output) for output in values.pop("outputs"))
        stats = Stats.from_json(values.pop("stats"))
        return cls(outputs=outputs, stats=stats, **values)


class Damaged(Exception):
    """A file on disk is not what was written; the message names it."""


def publish(
    stage_folder: Path,
    folder: Path,
    *,
    index: int,
    fingerprint: str,
    stats: Stats,
    seconds: float,
    attempt: int,
) -> Manifest:
    """Publish what an attempt wrote into `folder`, a child of `stage_folder/store`.

    `seconds` is what it took so far; the manifest's also hold what it takes to publish: to force
    the files to the disk and to read them back.
    Returns the manifest that won: this attempt's, or that of another attempt which was first, in
    which case `folder` is removed. Raises `Damaged` if the disk does not return what was written,
    and `OSError` on any failed write; nothing is published then.
    """
    began = time.monotonic()
    if not stats.balanced():
        lost = stats.rows_in - stats.rows_out - sum(stats.dropped.values())
        raise AssertionError(f"{lost} of {stats.rows_in} rows are unaccounted for: {stats}")
    outputs = tuple(_check_output(path, folder) for path in files.walk(folder))
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder, folder.parent):
        files.fsync(path)
    manifest = Manifest(
        stage=stage_folder.name,
        index=index,
        fingerprint=fingerprint,
        store=folder.name,
        outputs=outputs,
        stats=stats,
        seconds=round(seconds + time.monotonic() - began, 3),
        memory_mb=memory.peak_bytes() / 2**20,
        finished=round(time.time(), 3),
        host=socket.gethostname(),
        job=os.environ.get("SLURM_JOB_ID", ""),
        attempt=attempt,
    )
    path = manifest_path(stage_folder, fingerprint)
    if not files.publish_once(path, manifest.to_json()):
        winner = Manifest.from_json(path.read_text())
        if winner.store != folder.name:  # an NFS server may repeat a link() that had succeeded
            files.remove_tree(folder)
        manifest = winner
    expose(stage_folder, manifest)
    return manifest


def manifest_path(stage_folder: Path, fingerprint: str) -> Path:
    """Where the manifest of a task with this fingerprint is, or will be.

    The task's number is no part of it: new inputs may move a task that is done to another place.
    """
    return stage_folder / "done" / f"{fingerprint[:16]}.json"


def find(stage_folder: Path, fingerprint: str) -> Manifest | None:
    """The manifest of a done task, or None. Its outputs are checked for presence and size."""
    manifest = _whole(stage_folder, manifest_path(stage_folder, fingerprint))
    return manifest if manifest and manifest.fingerprint == fingerprint else None


def everything(stage_folder: Path, but: Iterable[str] = ()) -> list[Manifest]:
    """All manifests whose outputs are there, planned now or for an earlier configuration.

    Those of the fingerprints `but` are not even read.
    """
    unread = {manifest_path(stage_folder, fingerprint) for fingerprint in but}
    paths = sorted({*(stage_folder / "done").glob("*.json")} - unread)
    found = (_whole(stage_folder, path) for path in paths)
    return [manifest for manifest in found if manifest]


def _whole(stage_folder: Path, path: Path) -> Manifest | None:
    """A manifest, if it can be read and its outputs have the sizes it gives."""
    if (manifest := read(path)) is None:
        return None
    for output in manifest.outputs:
        try:
            if stored(stage_folder, manifest, output).stat().st_size != output.bytes:
                return None
        except FileNotFoundError:
            return None
    return manifest


def read(path: Path) -> Manifest | None:
    """A manifest, or None if it is not there, or is none that could be in this place."""
    try:
        manifest = Manifest.from_json(path.read_text())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    stage_folder = path.parent.parent
    own = manifest.stage == stage_folder.name
    return manifest if own and path == manifest_path(stage_folder, manifest.fingerprint) else None


def withdraw(stage_folder: Path, fingerprint: str) -> None:
    """Remove the manifest of a task whose outputs are lost, so that it can be published again."""
    path = manifest_path(stage_folder, fingerprint)
    if find(stage_folder, fingerprint) is None:
        path.unlink(missing_ok=True)


def discard(stage_folder: Path, manifest: Manifest) -> None:
    """Remove a manifest whose outputs turned out damaged: its task runs again."""
    manifest_path(stage_folder, manifest.fingerprint).unlink(missing_ok=True)


def revise(stage_folder: Path, manifest: Manifest, folder: Path) -> Manifest:
    """Put `folder`, a child of `stage_folder/store`, in the place of a done task's outputs.

    It has files of the same names; one that is the old file under a second name is not read again.
    The task stays done, whoever reads its outputs sees others. One rename decides; then the old
    ones are removed.
    """
    store = stage_folder / "store" / manifest.store
    known = {output.name: output for output in manifest.outputs}
    outputs = []
    for path in files.walk(folder):
        name = path.relative_to(folder).as_posix()
        same = path.samefile(store / name)
        outputs.append(known[name] if same else _check_output(path, folder))
    assert [o.name for o in outputs] == sorted(known), f"{folder}: not the outputs of {store}"
    for path in (folder, folder.parent):
        files.fsync(path)
    revised = replace(manifest, store=folder.name, outputs=tuple(outputs))
    path = manifest_path(stage_folder, manifest.fingerprint)
    files.write_atomic(path, revised.to_json())
    for output in outputs:
        shown = stage_folder / "out" / output.name
        if shown.exists() and shown.samefile(store / output.name):
            files.link_in_place(folder / output.name, shown)
    shutil.rmtree(store)
    return revised


def take_over(stage_folder: Path, manifest: Manifest, fingerprint: str) -> None:
    """Let what a task gave stand for another task too, which would give the same."""
    taken = replace(manifest, fingerprint=fingerprint)
    files.publish_once(manifest_path(stage_folder, fingerprint), taken.to_json())


def prune(stage_folder: Path, current: Sequence[Manifest]) -> int:
    """Remove what no current manifest names: earlier configurations, dead attempts. Bytes freed
    in the store.

    Call it only when the whole stage is done: then any attempt still running has lost its race.
    """
    keep_manifests = {manifest_path(stage_folder, m.fingerprint).name for m in current}
    for path in (stage_folder / "done").iterdir():
        if path.name not in keep_manifests:
            path.unlink()
    keep_names = {output.name for manifest in current for output in manifest.outputs}
    out = stage_folder / "out"
    for path in list(files.walk(out)) if out.exists() else []:
        if path.relative_to(out).as_posix() not in {*keep_names, REMOVED}:
            path.unlink()
    shutil.rmtree(stage_folder / "partial", ignore_errors=True)
    keep_stores = {manifest.store for manifest in current}
    freed = 0
    for folder in (stage_folder / "store").iterdir():
        if folder.name not in keep_stores:
            freed += files.remove_tree(folder)
    return freed


def sweep(stage_folder: Path, current: Sequence[Manifest]) -> None:
    """Remove what attempts at published tasks have left for attempts that will never come."""
    published = {manifest.fingerprint[:16] for manifest in current}
    partial = stage_folder / "partial"
    for folder in list(partial.iterdir()) if partial.exists() else []:
        if folder.name in published:
            shutil.rmtree(folder, ignore_errors=True)


def expose(stage_folder: Path, manifest: Manifest) -> None:
    """Give every output its stable name below `out/`; repeating it is harmless."""
    for output in manifest.outputs:
        stored = stage_folder / "store" / manifest.store / output.name
        files.link_in_place(stored, stage_folder / "out" / output.name)


def stored(stage_folder: Path, manifest: Manifest, output: Output) -> Path:
    """Where builds read an output."""
    return stage_folder / "store" / manifest.store / output.name


def _check_output(path: Path, folder: Path) -> Output:
    """Force one file to the disk, read it back, and prove that its format is whole."""
    digest = files.reread_sha256(path)
    try:
        rows = formats.rows(path)
    except Exception as error:
        raise Damaged(f"{path}: does not read back: {error}") from error
    return Output(path.relative_to(folder).as_posix(), path.stat().st_size, digest, rows)


def digest(value: object) -> str:
    """SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
