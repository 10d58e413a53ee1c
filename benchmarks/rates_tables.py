"""What the tasks that read tables of the whole dataset cost: screen, and the end of pack.

For `benchmarks.rates`. The tables are of generated pairs.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.scale import QUERIES
from benchmarks.timing import seconds
from dataset_build import dedup, pack, records, screen
from dataset_build.screen import duplicates, near, perceptual
from pipeline import manifest, recipe, runner
from pipeline.executor import Ended
from pipeline.local import LocalExecutor
from pipeline.rates import Observation
from pipeline.stage import Planned, Run, Stage, Task
from pipeline.stats import Stats
from pipeline.stop import StopFlag

_SHARD = 10_000


def observed(folder: Path) -> tuple[list[Observation], float, dict[str, float]]:
    """Tasks of two sizes, seconds a pair of one pass of screen over half of the digests, figures
    of row groups."""
    seen: list[Observation] = []
    for shards in (4, 40):
        run = Run(folder / str(shards), recipe.Config())
        uids = _uids(shards * _SHARD)
        seen += [*_screen(run, uids), _gather(run, uids, shards)]
        runner.describe(run, recipe.build_stages(recipe.Config()))
    # Half of the digests, as one pass of two takes them.
    paths = [run.path(reference) for reference in run.find("download:fetched-*.parquet")]
    took, _ = seconds(lambda: duplicates.digests(paths, 0, 2, lambda: None))
    figures = _row_groups(folder / "groups.parquet")
    return seen, took / len(uids), {**figures, "screen.scan_s": _scan_s()}


def _scan_s(rows: int = 4_000_000) -> float:
    """Seconds a picture that has no key in a range of keys."""
    random = np.random.default_rng(4)
    words = random.integers(0, 2**32, (1, rows), np.uint32)
    weak = np.full((1, rows), 0x1010101, np.uint32)
    classes = np.arange(rows, dtype=np.uint32)
    took, _ = seconds(lambda: near.keys_of(words, weak, classes, (0, 0, 1 << 24), lambda: None))
    return took / rows


def _row_groups(path: Path, groups: int = 1024) -> dict[str, float]:
    """What a row group of a matched file takes: to be written, and in the footer."""
    row = _table({"uid": _uids(1)}, records.MATCHED)

    def write() -> None:
        with records.writer(path, records.MATCHED) as matched:
            for _ in range(groups):
                matched.write_table(row)

    write_s, _ = seconds(write)
    read_s = min(seconds(lambda: pq.read_metadata(path))[0] for _ in range(5))
    size = path.stat().st_size
    numbers = {"write_s": write_s, "read_s": read_s, "bytes": size}
    return {f"row_group.{name}": value / groups for name, value in numbers.items()}


def _uids(rows: int) -> pa.Array:
    """Ascending, as good as any."""
    high = np.sort(np.random.default_rng(0).integers(0, 2**63, rows).astype(np.uint64) * 2)
    raw = np.stack([high, np.arange(rows, dtype=np.uint64)], 1).astype(">u8").tobytes()
    return pa.FixedSizeBinaryArray.from_buffers(records.UID, rows, [None, pa.py_buffer(raw)])


def _screen(run: Run, uids: pa.Array) -> list[Observation]:
    """All but the look, and what is compared with evaluation sets."""
    rows = len(uids)
    queries = np.random.default_rng(1).integers(0, QUERIES, 3 * rows).astype(np.uint32)
    offsets = pa.array(np.arange(0, 3 * rows + 1, 3), pa.int32())
    selected_by = pa.ListArray.from_arrays(offsets, pa.array(queries))
    digests = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), rows, [None, pa.py_buffer(np.random.default_rng(2).bytes(32 * rows))]
    )
    url = pa.array([f"https://www.site.example/images/{row}.jpg" for row in range(rows)])
    text = pa.repeat("a picture of something with a caption of some length", rows)
    columns = {"uid": uids, "url": url, "text": text, "sha256": digests, "selected_by": selected_by}
    columns |= {"query_ids": selected_by, "status": pa.repeat("ok", rows)}
    count = len(dedup.groups(run))
    selected: dict[str, pa.Table] = {}
    group = dedup.group_of(run, uids)
    for number in range(count):
        first, stop = np.searchsorted(group, [number, number + 1])
        part = {name: column.slice(first, stop - first) for name, column in columns.items()}
        selected[f"selected-{number:05d}.parquet"] = _table(part, records.SELECTED)
    _publish(run, "balance", {**selected, "counts.npy": np.zeros(QUERIES, np.uint64)})
    name = "fetched-00000-of-00001.parquet"
    _publish(run, "download", {name: _table(columns, records.FETCHED)})
    looked = "looked-00000-of-00001.parquet"
    random = np.random.default_rng(3)
    hashes, weak = perceptual.bits_of(random.standard_normal((rows, 256)))
    columns |= {"pdq": _binary(hashes), "pdq_weak": _binary(weak), "pdq_quality": _full(rows, 100)}
    _publish(run, "screen", {looked: _table(columns, records.looked(()))})
    reads = ["balance:counts.npy", f"download:{name}"]
    reads += [f"balance:{name}" for name in sorted(selected)]
    arrays = [f"screen:{name}.npy" for name in ("hashes", "weak", "classes")]
    slots = [(0, 0, 1)]
    more = ["screen:classes.npy", "screen:edges-00000.npy", f"screen:{looked}"]
    phases: list[tuple[str, list[str], dict[str, Any], int]] = [
        ("pictures", [f"screen:{looked}"], {"phase": "collect"}, rows),
        ("pictures and parts", arrays, {"phase": "near", "part": 0, "slots": slots}, rows),
        ("pairs", [*reads, *more], {"phase": "decide"}, rows),
    ]
    seen = []
    for index, (unit, names, params, units) in enumerate(phases, 1):
        task = Task("screen", index, tuple(names), params)
        seen.append(_observed(run, screen.STAGE, task, f"screen.{params['phase']}", units, unit))
    return seen


def _binary(raw: perceptual.U8) -> pa.Array:
    rows, width = raw.shape
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), rows, [None, pa.py_buffer(raw.tobytes())]
    )


def _full(rows: int, value: int) -> pa.Array:
    return pa.array(np.full(rows, value, np.uint8))


def _gather(run: Run, uids: pa.Array, shards: int) -> Observation:
    index, tars = {}, {}
    for shard in range(shards):
        part = {"uid": uids.slice(shard * _SHARD, _SHARD)}
        lists = pa.ListArray.from_arrays(
            pa.array(np.arange(_SHARD + 1), pa.int32()), pa.array(np.zeros(_SHARD, np.uint32))
        )
        part |= {"query_ids": lists, "selected_by": lists}
        index[f"index-{shard:05d}.parquet"] = _table(
            part, records.INDEX.with_metadata({b"openwit.removed": b""})
        )
        tars[f"shards/{shard:05d}.tar"] = bytes(2 * tarfile.BLOCKSIZE)
    _publish(run, "pack", {**index, **tars})
    reads = [f"pack:{name}" for name in (*sorted(index), *sorted(tars))]
    task = Task("pack", 1, tuple(reads), {"gather": True})
    return _observed(run, pack.STAGE, task, "pack.gather", len(uids))


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Columns of a schema; those that do not matter are null."""
    rows = len(columns["uid"])
    arrays = [columns.get(field.name, pa.nulls(rows, field.type)) for field in schema]
    return pa.table([a.cast(f.type) for a, f in zip(arrays, schema, strict=True)], schema=schema)


def _publish(run: Run, stage: str, outputs: dict[str, Any]) -> None:
    """Make files the outputs of a stage: tables, arrays or bytes."""
    planned = Planned(Task(stage, 0), f"{0:016x}")
    folder = run.stage_folder(stage) / "store" / "made"
    for name, content in outputs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path, compression="zstd", row_group_size=1 << 16)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content)
    manifest.publish(
        run.stage_folder(stage),
        folder,
        index=0,
        fingerprint=planned.fingerprint,
        stats=Stats(),
        seconds=0,
        attempt=1,
    )
    run.save_plan(stage, [planned])


def _observed(
    run: Run, stage: Stage, task: Task, kind: str, units: int, unit: str = "pairs"
) -> Observation:
    """Run one task as a build does, in a process of its own; what it cost."""
    runner.describe(run, recipe.build_stages(run.config))  # type: ignore[arg-type]
    planned = Planned(task, f"{task.index:016x}")
    before = [one for one in run.plan(stage.name) if one.task.index < task.index]
    run.save_plan(stage.name, [*before, planned])
    for name in ("done", "store", "logs", "live", "failed"):
        (run.stage_folder(stage.name) / name).mkdir(parents=True, exist_ok=True)
    executor = LocalExecutor(run.settings("local"), StopFlag())
    ended = [outcome for outcome in executor.submit(run, stage, [planned]) if outcome]
    assert ended[0].ended is Ended.DONE, ended[0].reason
    done = manifest.find(run.stage_folder(stage.name), planned.fingerprint)
    assert done
    kept = sum(output.bytes for output in done.outputs)
    return Observation(kind, unit, units, done.seconds, done.memory_mb, kept, len(done.outputs))
