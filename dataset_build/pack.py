"""The pairs that survived, as WebDataset shards in the order of uids, with an index into them.

A uid is a hash, so its order is a random order: every shard is a fair sample of the dataset. The
bytes of a shard follow from its pairs and pictures alone, never from who fetched what when.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from dataset_build import dedup, records, removed, uid_range
from pipeline import tar
from pipeline.config import Settings, UserError
from pipeline.manifest import Damaged, Stats, digest
from pipeline.stage import Attempt, Run, Stage, Task

_SELECTED = ("uid", "occurrences", "query_ids", "probability")
_FETCHED = (
    "uid",
    "status",
    "url",
    "text",
    "page_url",
    "source",
    "snapshot",
    "final_url",
    "sha256",
    "width",
    "height",
    "original_width",
    "original_height",
    "staged",
    "staged_offset",
    "staged_bytes",
    "staged_sha256",
    "bytes",
    "format",
)


_REMOVED = b"openwit.removed"
"""Metadata of a shard's part of the index: the uids that it is without, one after the other."""


class PackSettings(Settings):
    """The shards."""

    pairs_per_shard: int = Field(10_000, gt=0)
    """Most pairs in one shard; all shards are equal within one pair."""


class NothingLeft(UserError):
    """No picture survived, so there is no dataset to write."""

    exit_code: ClassVar[int] = 1


def plan(run: Run) -> list[Task]:
    """A task per shard: a range of ranks among the survivors, with just the files that hold it."""
    survivors = json.loads(run.path("screen:survivors.json").read_text())
    total = sum(entry["kept"] for entry in survivors)
    if not total:
        raise NothingLeft(
            "pack: not one picture survived download and screen; "
            "see `dropped` in the manifests below RUN/download/done for why"
        )
    selected = run.find("balance:selected-*.parquet")
    tars = _tars(run)
    settings: PackSettings = run.settings("pack")
    shards = -(-total // settings.pairs_per_shard)
    digits = max(5, len(str(shards - 1)))  # so that names sort as numbers do
    tasks = []
    for shard in range(shards):
        first, after = shard * total // shards, (shard + 1) * total // shards
        names: list[str] = []
        skip = passed = 0
        for entry in survivors:
            if passed < after and passed + entry["kept"] > first:
                if not names:
                    skip = first - passed
                names.append(entry["file"].removeprefix("screened-"))
            passed += entry["kept"]
        fetched = [f"download:fetched-{name}" for name in names]
        groups = dedup.within(run, uid_range.of_file(names[0])[0], uid_range.of_file(names[-1])[1])
        reads = [f"screen:screened-{name}" for name in names] + fetched
        reads += [selected[group] for group in groups]
        reads += sorted({tar for reference in fetched for tar in tars[reference]})
        params = {
            "shard": f"{shard:0{digits}d}",
            "skip": skip,
            "pairs": after - first,
            "files": len(names),
            "selected": len(groups),
        }
        tasks.append(Task("pack", shard, tuple(reads), params))
    return tasks


def _tars(run: Run) -> dict[str, list[str]]:
    """The staged tars that hold the pictures of each `fetched-*.parquet`, as references."""
    found = {}
    for manifest in run.manifests("download"):
        names = [f"download:{output.name}" for output in manifest.outputs]
        tars = [name for name in names if name.endswith(".tar")]
        found.update({name: tars for name in names if "fetched-" in name})
    return found


def gather(run: Run) -> list[Task]:
    """One task over all shards: the index and the dataset's description."""
    reads = (*run.find("pack:index-*.parquet"), *run.find("pack:shards/*.tar"))
    return [Task("pack", len(run.plan("pack")), reads, {"gather": True})]


def work(attempt: Attempt) -> Stats:
    """Write one shard and its part of the index, or gather the parts."""
    if attempt.task.params.get("gather"):
        return _gather(attempt)
    params = attempt.task.params
    paths = attempt.inputs()
    files = params["files"]
    screened, fetched, rest = paths[:files], paths[files : 2 * files], paths[2 * files :]
    selected, staged = rest[: params["selected"]], rest[params["selected"] :]
    columns = ["uid", "selected_by"]
    kept = pa.concat_tables(
        [pq.read_table(path, filters=[("keep", "=", True)], columns=columns) for path in screened]
    ).slice(params["skip"], params["pairs"])
    uids: list[Any] = kept["uid"].to_pylist()
    assert len(uids) == params["pairs"], f"{len(uids)} of {params['pairs']} survivors"
    check = attempt.stop.check
    pictures = _rows(uids, fetched, _FETCHED, check)
    pairs = _rows(uids, selected, _SELECTED, check)
    for row in kept.to_pylist():
        pairs[row["uid"]]["selected_by"] = row["selected_by"]

    name = f"{params['shard']}.tar"
    (attempt.folder / "shards").mkdir()
    index = []
    gone = [uid for uid in uids if pictures[uid]["status"] == removed.STATUS]
    with _Pictures(staged) as source, (attempt.folder / "shards" / name).open("wb") as shard:
        for uid in uids:
            check()
            pair, picture = pairs[uid], pictures[uid]
            if picture["status"] == removed.STATUS:  # its rank stays, so no other shard moves
                continue
            image = source.read(picture)
            entry = _write_sample(shard, uid, image, pair, picture)
            index.append({**entry, "shard": name})
            attempt.progress(len(index), len(uids), "pairs")
        tar.finish(shard)
    part = attempt.folder / f"index-{params['shard']}.parquet"
    schema = records.INDEX.with_metadata({_REMOVED: b"".join(gone)})
    pq.write_table(pa.Table.from_pylist(index, schema=schema), part, compression="zstd")
    stats = Stats(rows_in=len(uids), rows_out=len(index))
    if gone:
        stats.drop(removed.STATUS, len(gone))
    stats.counts["picture_bytes"] = sum(entry["image_bytes"] for entry in index)
    return stats


def _rows(
    uids: list[bytes], paths: list[Path], columns: tuple[str, ...], check: Any
) -> dict[bytes, dict[str, Any]]:
    """The rows of `uids`, which ascend. Raises `Damaged` if one is not there."""
    among = pa.array(uids, records.UID)
    table = uid_range.read(paths, uids[0], uids[-1], columns, check, among)
    found = {row["uid"]: row for row in table.to_pylist()}
    if missing := set(uids) - found.keys():
        raise Damaged(f"{paths[0]}, …: {len(missing)} pairs are missing, as {min(missing).hex()}")
    return found


class _Pictures:
    """Staged pictures, read from where their outcomes say that they are."""

    def __init__(self, tars: list[Path]) -> None:
        self._streams = {path.name: path.open("rb") for path in tars}

    def __enter__(self) -> _Pictures:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in self._streams.values():
            stream.close()

    def read(self, picture: dict[str, Any]) -> bytes:
        """The picture's bytes. Raises `Damaged` if they are not what was stored."""
        stream = self._streams[picture["staged"]]
        stream.seek(picture["staged_offset"])
        data = stream.read(picture["staged_bytes"])
        if hashlib.sha256(data).digest() != picture["staged_sha256"]:
            raise Damaged(f"{stream.name}: the picture of {picture['uid'].hex()} has changed")
        return data


def _write_sample(
    shard: BinaryIO, uid: bytes, image: bytes, pair: dict[str, Any], picture: dict[str, Any]
) -> dict[str, Any]:
    """Append a sample's three members; its row of the index, but for the shard's name."""
    text = picture["text"].encode()
    offset = shard.tell()
    image_offset = tar.write_member(shard, f"{uid.hex()}.jpg", image)
    text_offset = tar.write_member(shard, f"{uid.hex()}.txt", text)
    tar.write_member(shard, f"{uid.hex()}.json", _provenance(pair, picture))
    return {
        "uid": uid,
        "offset": offset,
        "length": shard.tell() - offset,
        "image_offset": image_offset,
        "image_bytes": len(image),
        "text_offset": text_offset,
        "text_bytes": len(text),
        "width": picture["width"],
        "height": picture["height"],
        "sha256": picture["staged_sha256"],
        "query_ids": pair["query_ids"],
        "selected_by": pair["selected_by"],
        "probability": pair["probability"],
    }


def _provenance(pair: dict[str, Any], picture: dict[str, Any]) -> bytes:
    values = {**pair, **picture, "uid": pair["uid"].hex()}
    for name in ("sha256", "staged_sha256"):
        values[name] = picture[name].hex()
    for name in ("status", "staged", "staged_offset", "staged_bytes"):
        del values[name]
    return json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def _gather(attempt: Attempt) -> Stats:
    """`index.parquet` out of its parts, and `dataset.json`."""
    paths = attempt.inputs()
    parts, shards = paths[: len(paths) // 2], paths[len(paths) // 2 :]
    samples = {}
    gone = b""
    with pq.ParquetWriter(
        attempt.folder / "index.parquet", records.INDEX, compression="zstd"
    ) as index:
        for part, shard in zip(parts, shards, strict=True):
            attempt.stop.check()
            table = pq.read_table(part)
            gone += table.schema.metadata[_REMOVED]
            samples[f"shards/{shard.name}"] = len(table)
            index.write_table(table.replace_schema_metadata())
            attempt.progress(len(samples), len(parts), "shards")
    entries = [
        {
            "name": output.name.removeprefix("shards/"),
            "bytes": output.bytes,
            "sha256": output.sha256,
            "samples": samples[output.name],
        }
        for output in _outputs(attempt.run)
        if output.name in samples
    ]
    description = {
        "fingerprint": digest([[shard["name"], shard["sha256"]] for shard in entries]),
        "samples": sum(samples.values()),
        "bytes": sum(shard["bytes"] for shard in entries),
        "removed": {"samples": len(gone) // 16, "sha256": hashlib.sha256(gone).hexdigest()},
        "pairs_by_shard": entries,
    }
    (attempt.folder / "dataset.json").write_text(json.dumps(description, indent=1))
    stats = Stats()  # the shards' own tasks have counted the rows
    stats.counts["shards"] = len(entries)
    return stats


def _outputs(run: Run) -> Iterator[Any]:
    for manifest in run.manifests("pack"):
        yield from manifest.outputs


STAGE = Stage(
    "pack", ("screen", "download", "balance"), plan, work, then=(gather,), unit="pairs", version=3
)
