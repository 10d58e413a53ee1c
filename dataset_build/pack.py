"""The pairs that survived, as WebDataset shards in the order of uids, with an index into them.

A uid is a hash, so its order is a random order: every shard is a fair sample of the dataset. The
bytes of a shard follow from its pairs and pictures alone, never from who fetched what when.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import Field

from dataset_build import dedup, records, removed, uid_range
from pipeline import files, tar
from pipeline.config import Settings, UserError
from pipeline.manifest import Damaged, digest
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stats import Stats

NAMES = re.compile(r"[0-9a-f]{32}\.(jpg|txt|json)")
"""Of the files in a shard."""
_SCREENED = ("uid", "selected_by", "captions", "duplicate_group")
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
    "blurred",
    "staged_bytes",
    "staged_sha256",
    "bytes",
    "format",
)


REMOVED = b"openwit.removed"
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
    queries = run.find("queries:queries.parquet")
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
        reads = queries + [f"screen:screened-{name}" for name in names] + fetched
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
    queries, *paths = attempt.inputs()
    count = params["files"]
    screened, fetched, rest = paths[:count], paths[count : 2 * count], paths[2 * count :]
    selected, staged = rest[: params["selected"]], rest[params["selected"] :]
    kept = pa.concat_tables(
        pq.read_table(path, filters=[("keep", "=", True)], columns=list(_SCREENED))
        for path in screened
    ).slice(params["skip"], params["pairs"])
    uids: list[Any] = kept["uid"].to_pylist()
    assert len(uids) == params["pairs"], f"{len(uids)} of {params['pairs']} survivors"
    check = attempt.stop.check
    pictures = _rows(uids, fetched, _FETCHED, check)
    pairs = _rows(uids, selected, _SELECTED, check)
    texts = _texts(queries, pairs)

    name = f"{params['shard']}.tar"
    (attempt.folder / "shards").mkdir()
    index = []
    gone = [uid for uid in uids if pictures[uid]["status"] == removed.STATUS]
    with _Pictures(staged) as source, (attempt.folder / "shards" / name).open("wb") as shard:
        for row in kept.to_pylist():
            check()
            pair, picture = pairs[row["uid"]] | row, pictures[row["uid"]]
            if picture["status"] == removed.STATUS:  # its rank stays, so no other shard moves
                continue
            pair["queries"] = [texts[query] for query in pair["query_ids"]]
            entry = _write_sample(shard, source.read(picture), pair, picture)
            index.append({**entry, "shard": name})
            attempt.progress(len(index), len(uids), "pairs")
        tar.finish(shard)
    part = attempt.folder / f"index-{params['shard']}.parquet"
    schema = records.INDEX.with_metadata({REMOVED: b"".join(gone)})
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


def _texts(queries: Path, pairs: dict[bytes, dict[str, Any]]) -> dict[int, str]:
    """The queries of some pairs, as they are written."""
    ids = sorted({query for pair in pairs.values() for query in pair["query_ids"]})
    found = pq.read_table(queries, columns=["text"])["text"].take(pa.array(ids, pa.int64()))
    return dict(zip(ids, found.to_pylist(), strict=True))


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
    shard: BinaryIO, image: bytes, pair: dict[str, Any], picture: dict[str, Any]
) -> dict[str, Any]:
    """Append a sample's three files; its row of the index, but for the shard's name."""
    name = pair["uid"].hex()
    text, provenance = picture["text"].encode(), _provenance(pair, picture)
    offset = shard.tell()
    image_offset = tar.write_member(shard, f"{name}.jpg", image)
    text_offset = tar.write_member(shard, f"{name}.txt", text)
    json_offset = tar.write_member(shard, f"{name}.json", provenance)
    return {
        "uid": pair["uid"],
        "offset": offset,
        "length": shard.tell() - offset,
        "image_offset": image_offset,
        "image_bytes": len(image),
        "text_offset": text_offset,
        "text_bytes": len(text),
        "json_offset": json_offset,
        "json_bytes": len(provenance),
        "width": picture["width"],
        "height": picture["height"],
        "sha256": picture["staged_sha256"],
        "sent_sha256": picture["sha256"],
        "caption_hash": xxhash.xxh3_64_intdigest(text),
        "json_hash": xxhash.xxh3_64_intdigest(provenance),
        "duplicate_group": pair["duplicate_group"],
        "query_ids": pair["query_ids"],
        "selected_by": pair["selected_by"],
        "probability": pair["probability"],
    }


def _provenance(pair: dict[str, Any], picture: dict[str, Any]) -> bytes:
    """Where a sample is from and why it is there; `sent_…` is of the file that the server sent."""
    values = {
        "uid": pair["uid"].hex(),
        **{name: picture[name] for name in ("url", "final_url", "page_url", "source", "snapshot")},
        **{name: picture[name] for name in ("text", "width", "height")},
        **{name: picture[name] for name in ("original_width", "original_height", "blurred")},
        **{name: pair[name] for name in ("query_ids", "queries", "selected_by", "probability")},
        **{name: pair[name] for name in ("occurrences", "captions")},
        "duplicate_group": pair["duplicate_group"].hex(),
        "bytes": picture["staged_bytes"],
        "sha256": picture["staged_sha256"].hex(),
        "sent_bytes": picture["bytes"],
        "sent_format": picture["format"],
        "sent_sha256": picture["sha256"].hex(),
    }
    return json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def _gather(attempt: Attempt) -> Stats:
    """`index.parquet` out of its parts, and `dataset.json`."""
    paths = attempt.inputs()
    parts, shards = paths[: len(paths) // 2], paths[len(paths) // 2 :]
    index = attempt.folder / "index.parquet"
    samples = {}
    gone = b""
    with pq.ParquetWriter(index, records.INDEX, compression="zstd") as writer:
        for part, shard in zip(parts, shards, strict=True):
            attempt.stop.check()
            table = pq.read_table(part)
            gone += table.schema.metadata[REMOVED]
            samples[f"shards/{shard.name}"] = len(table)
            writer.write_table(table.replace_schema_metadata())
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
    (attempt.folder / "dataset.json").write_text(description(index, entries, gone))
    stats = Stats()  # the shards' own tasks have counted the rows
    stats.counts["shards"] = len(entries)
    return stats


def description(index: Path, shards: Sequence[Mapping[str, Any]], gone: bytes) -> str:
    """The text of `dataset.json`: the checksums of all files, and a fingerprint over them.

    `shards`: name, bytes, sha256 and samples of each, in the order of the index. `gone`: uids that
    were removed, one after the other.
    """
    values = {
        "samples": sum(shard["samples"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "removed": {"samples": len(gone) // 16, "sha256": hashlib.sha256(gone).hexdigest()},
        "index": {"bytes": index.stat().st_size, "sha256": files.sha256(index)},
        "pairs_by_shard": list(shards),
    }
    return written({"fingerprint": digest(values), **values})


def written(values: Mapping[str, Any]) -> str:
    """A description as `dataset.json` has it."""
    return json.dumps(values, indent=1) + "\n"


def _outputs(run: Run) -> Iterator[Any]:
    for manifest in run.manifests("pack"):
        yield from manifest.outputs


STAGE = Stage(
    "pack",
    ("screen", "download", "balance", "queries"),
    plan,
    work,
    then=(gather,),
    unit="pairs",
    version=5,
)
