"""Rows and pictures of what was removed, taken out of the files that a run has published.

Each file is replaced by one of the same name that says the same of all others, at the same places.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_build import removed
from pipeline import files, tar
from pipeline import manifest as published
from pipeline.manifest import Manifest
from pipeline.stage import Run

SCREEN = "screen"
_ROWS = ("fetched-", "unused-")
_AHEAD = 1 << 14  # between the headers of a tar there is a picture to skip

Inode = tuple[int, int]
"""Device and inode: what all names of a file have in common."""


@dataclass
class Found:
    """What is to go from the run's downloads, of earlier configurations too."""

    rows: dict[str, dict[str, npt.NDArray[np.int64]]] = field(default_factory=dict)
    """By manifest's fingerprint and file."""
    uids: set[bytes] = field(default_factory=set)
    """Of those rows."""
    addresses: set[str] = field(default_factory=set)
    """Names, in tars, of the files of whatever was removed."""
    tars: set[str] = field(default_factory=set)
    """Where such files may be. A tar may be part of several downloads: it has the name in all."""


def find(run: Run, tombstones: removed.Tombstones, known: Collection[bytes]) -> Found:
    """Look through all downloads. Of `known` uids the rows may be gone and pictures still there."""
    found = Found()
    among = pa.array(sorted(known), pa.binary(16))
    for manifest in published.everything(run.stage_folder("download")):
        store = run.stage_folder("download") / "store" / manifest.store
        holds_some = False
        for output in manifest.outputs:
            if not output.name.startswith(_ROWS):
                continue
            table = pq.read_table(store / output.name, columns=list(removed.COLUMNS))
            covered = tombstones.rows(table)
            if covered.any():
                rows = np.flatnonzero(covered)
                found.rows.setdefault(manifest.fingerprint, {})[output.name] = rows
                found.uids.update(table["uid"].take(pa.array(rows)).to_pylist())
            gone = covered | pc.is_in(table["uid"], value_set=among).to_numpy()
            for uid in table["uid"].filter(pa.array(gone)).to_pylist():
                found.addresses.add(uid[:8].hex())
                holds_some = True
        if holds_some:
            found.tars.update(o.name for o in manifest.outputs if o.name.endswith(".tar"))
    return found


def captions(run: Run, tombstones: removed.Tombstones) -> None:
    """Remove the texts of removed pairs from the captions of pairs with about the same picture."""
    texts: dict[bytes, str] = {}
    for table in removed.outcomes(run, (*removed.COLUMNS, "text")):
        gone = table.filter(pa.array(tombstones.rows(table)))
        texts.update(zip(gone["uid"].to_pylist(), gone["text"].to_pylist(), strict=True))
    if not texts:
        return
    folder = run.stage_folder(SCREEN)
    of_group: dict[bytes, set[str]] = {}
    uids = pa.array(sorted(texts), pa.binary(16))
    for _, path in _screened(folder):
        table = pq.read_table(path, columns=["uid", "duplicate_group"])
        for row in table.filter(pc.is_in(table["uid"], value_set=uids)).to_pylist():
            of_group.setdefault(row["duplicate_group"], set()).add(texts[row["uid"]])
    replaced: dict[str, tuple[Manifest, Path]] = {}
    groups = pa.array(sorted(of_group), pa.binary(16))
    for manifest, path in _screened(folder):
        table = pq.read_table(path)
        if not pc.any(pc.is_in(table["duplicate_group"], value_set=groups)).as_py():
            continue
        revised = _without_texts(table, texts, of_group)
        if revised.equals(table):
            continue
        if manifest.store not in replaced:
            replaced[manifest.store] = manifest, _new_store(folder, manifest)
        _write(revised, replaced[manifest.store][1] / path.name)
    for manifest, new in replaced.values():
        for output in manifest.outputs:
            if not (new / output.name).exists():
                os.link(folder / "store" / manifest.store / output.name, new / output.name)
        published.revise(folder, manifest, new)


def _screened(folder: Path) -> Iterator[tuple[Manifest, Path]]:
    for manifest in published.everything(folder):
        for output in manifest.outputs:
            if output.name.startswith("screened-"):
                yield manifest, folder / "store" / manifest.store / output.name


def _without_texts(
    table: pa.Table, texts: dict[bytes, str], of_group: dict[bytes, set[str]]
) -> pa.Table:
    """Verdicts without the texts of some pairs, and of their groups."""
    rows = table.to_pylist()
    for row in rows:
        if row["uid"] in texts:
            row["captions"] = []
        elif others := of_group.get(row["duplicate_group"]):
            own, rest = row["captions"][:1], row["captions"][1:]
            row["captions"] = own + [text for text in rest if text not in others]
    return pa.Table.from_pylist(rows, schema=table.schema)


def outcomes(run: Run, found: Found) -> None:
    """Replace what `find` found: rows by ones that say no more than "removed", pictures by zeros.

    A tar that is part of several downloads is written once, and is one file in all of them again.
    """
    folder = run.stage_folder("download")
    held: dict[Inode, list[tar.Member]] = {}
    emptied: dict[Inode, Path] = {}
    for manifest in published.everything(folder):
        old = folder / "store" / manifest.store
        rows = found.rows.get(manifest.fingerprint, {})
        tars: dict[str, Inode] = {}
        for output in manifest.outputs:
            if output.name in found.tars:
                inode = _inode(old / output.name)
                if inode not in held:
                    held[inode] = list(_held(old / output.name, found.addresses))
                if held[inode]:
                    tars[output.name] = inode
        if not rows and not tars:
            continue
        new = _new_store(folder, manifest)
        for output in manifest.outputs:
            source, target = old / output.name, new / output.name
            if output.name in rows:
                _redact(source, target, rows[output.name])
            elif output.name not in tars:
                os.link(source, target)
            elif (inode := tars[output.name]) in emptied:
                os.link(emptied[inode], target)
            else:
                _without(source, target, held[inode])
                emptied[inode] = target
        published.revise(folder, manifest, new)


def left(run: Run, found: Found) -> int:
    """How many files in tars are of removed addresses, and not blank."""
    folder = run.stage_folder("download")
    paths = {
        _inode(path): path
        for manifest in published.everything(folder)
        for output in manifest.outputs
        if output.name in found.tars
        for path in [folder / "store" / manifest.store / output.name]
    }
    return sum(1 for path in paths.values() for _ in _held(path, found.addresses))


def _inode(path: Path) -> Inode:
    known = path.stat()
    return known.st_dev, known.st_ino


def _new_store(stage_folder: Path, manifest: Manifest) -> Path:
    new = stage_folder / "store" / f"{manifest.index:05d}.{files.attempt_name()}"
    new.mkdir()
    return new


def _write(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd", row_group_size=1 << 16)


def _redact(source: Path, target: Path, numbers: npt.NDArray[np.int64]) -> None:
    """Copy outcomes; some rows of them as `removed.redacted` has them."""
    table = pq.read_table(source)
    rows = table.to_pylist()
    for number in numbers.tolist():
        rows[number] = removed.redacted(rows[number], table.schema.names)
    _write(pa.Table.from_pylist(rows, schema=table.schema), target)


def _held(path: Path, addresses: Collection[str]) -> Iterator[tar.Member]:
    """The files of some addresses in a tar that are not blank."""
    with tar.opened(path, ahead=_AHEAD) as opened:
        for member in tar.members(opened):
            if member.name.partition(".")[0] in addresses:
                data = opened.read(member.offset, member.size)
                if data != _blank(member):
                    yield member


def _without(source: Path, target: Path, members: Collection[tar.Member]) -> None:
    """Copy a staged tar; of some files only the names stay.

    Everything else stays where it is, so rows go on to say where their pictures lie.
    """
    shutil.copyfile(source, target)
    with target.open("r+b") as stream:
        for member in members:
            stream.seek(member.offset)
            stream.write(_blank(member))


def _blank(member: tar.Member) -> bytes:
    """What is to be JSON stays JSON."""
    is_json = member.name.endswith(".json")
    return b"{}".ljust(member.size)[: member.size] if is_json else bytes(member.size)
