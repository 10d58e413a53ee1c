"""Rows and pictures of what was removed, taken out of the files that a run has published.

Each file is replaced by one of the same name that says the same of all others, at the same places.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

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


def captions(run: Run) -> None:
    """Remove the texts of removed pairs from the captions of pairs with about the same picture."""
    texts: dict[bytes, str] = {}
    tombstones = removed.Tombstones(run.folder)
    for table in removed.outcomes(run, (*removed.COLUMNS, "text")):
        gone = table.filter(pa.array(tombstones.rows(table)))
        texts.update(zip(gone["uid"].to_pylist(), gone["text"].to_pylist(), strict=True))
    if not texts:
        return
    folder = run.stage_folder(SCREEN)
    screened = [
        (manifest, output.name, folder / "store" / manifest.store / output.name)
        for manifest in published.everything(folder)
        for output in manifest.outputs
        if output.name.startswith("screened-")
    ]
    of_group: dict[bytes, set[str]] = {}
    uids = pa.array(sorted(texts), pa.binary(16))
    for _, _, path in screened:
        table = pq.read_table(path, columns=["uid", "duplicate_group"])
        for row in table.filter(pc.is_in(table["uid"], value_set=uids)).to_pylist():
            of_group.setdefault(row["duplicate_group"], set()).add(texts[row["uid"]])
    changed: dict[str, tuple[Manifest, dict[str, pa.Table]]] = {}
    for manifest, name, path in screened:
        table = pq.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            if row["uid"] in texts:
                row["captions"] = []
            elif others := of_group.get(row["duplicate_group"]):
                own, rest = row["captions"][:1], row["captions"][1:]
                row["captions"] = own + [text for text in rest if text not in others]
        revised = pa.Table.from_pylist(rows, schema=table.schema)
        if not revised.equals(table):
            changed.setdefault(manifest.fingerprint, (manifest, {}))[1][name] = revised
    for manifest, tables in changed.values():
        old = folder / "store" / manifest.store
        new = folder / "store" / f"{manifest.index:05d}.{files.attempt_name()}"
        new.mkdir()
        for output in manifest.outputs:
            if output.name in tables:
                path = new / output.name
                pq.write_table(
                    tables[output.name], path, compression="zstd", row_group_size=1 << 16
                )
            else:
                os.link(old / output.name, new / output.name)
        published.revise(folder, manifest, new)


def outcomes(run: Run) -> int:
    """Remove from every download of the run, of earlier configurations too; the rows that were."""
    folder = run.stage_folder("download")
    tombstones = removed.Tombstones(run.folder)
    emptied: dict[tuple[int, int], Path] = {}
    rows = 0
    for manifest in published.everything(folder):
        tables = {}
        for output in manifest.outputs:
            if output.name.startswith(_ROWS):
                path = folder / "store" / manifest.store / output.name
                mask = tombstones.rows(pq.read_table(path, columns=list(removed.COLUMNS)))
                if mask.any():
                    tables[output.name] = mask
                    rows += int(mask.sum())
        if tables:
            _revise(folder, manifest, tables, emptied)
    return rows


def _revise(
    stage_folder: Path,
    manifest: Manifest,
    masks: dict[str, removed.Mask],
    emptied: dict[tuple[int, int], Path],
) -> None:
    """Publish a download's outputs without the rows of `masks`.

    A tar may be part of several downloads under several names: `emptied` says by device and inode
    where it is now.
    """
    old = stage_folder / "store" / manifest.store
    new = stage_folder / "store" / f"{manifest.index:05d}.{files.attempt_name()}"
    new.mkdir()
    pictures: dict[str, set[bytes]] = {}
    for output in manifest.outputs:
        if output.name not in masks:
            continue
        table = pq.read_table(old / output.name)
        rows = table.to_pylist()
        for number in masks[output.name].nonzero()[0]:
            row = rows[number]
            if row["staged"]:
                pictures.setdefault(row["staged"], set()).add(row["uid"][:8])
            rows[number] = removed.redacted(row, table.schema.names)
        redacted = pa.Table.from_pylist(rows, schema=table.schema)
        pq.write_table(redacted, new / output.name, compression="zstd", row_group_size=1 << 16)
    for output in manifest.outputs:
        if output.name not in masks:
            source = old / output.name
            if output.name in pictures:
                known = source.stat()
                key = known.st_dev, known.st_ino
                if key not in emptied:
                    _without(source, new / output.name, pictures[output.name])
                    emptied[key] = new / output.name
                    continue
                source = emptied[key]
            os.link(source, new / output.name)
    published.revise(stage_folder, manifest, new)


def _without(source: Path, target: Path, addresses: set[bytes]) -> None:
    """Copy a staged tar; of some addresses only the names of their files stay.

    Everything else stays where it is, so rows go on to say where their pictures lie.
    """
    names = {address.hex() for address in addresses}
    shutil.copyfile(source, target)
    left = set(names)
    with tar.opened(source) as opened, target.open("r+b") as stream:
        for member in tar.members(opened):
            key, _, kind = member.name.partition(".")
            if key in names:
                # What is to be JSON stays JSON.
                blank = b"{}".ljust(member.size) if kind == "json" else bytes(member.size)
                stream.seek(member.offset)
                stream.write(blank[: member.size])
                left.discard(key)
    assert not left, f"{source}: pictures of {min(left, default='')} are not in it"
