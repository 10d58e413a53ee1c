"""Image links of a WAT file: from the file to candidates, against two ways of reading it.

The peers are MetaCLIP's (gzip, json) and cc2dataset's (FastWARC, pysimdjson); what they leave out
that ours does is said in `extract_peers`. Each side reads a file of `OPENWIT_EXTRACT_MB` (200)
compressed MB in a process of its own, on one thread, in turns, and the least CPU time of five
counts: what else the machine does can only add to it. The file is made up from real pages
(`extract_inputs`) and kept in `OPENWIT_EXTRACT_FOLDER`, if that is set.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import extract_inputs, extract_peers
from benchmarks.timing import memory_mb
from dataset_build.extract import ExtractSettings, wat
from dataset_build.extract.candidates import Candidates
from pipeline.config import MissingInput

_ROUNDS = 5
_PEERS = ("metaclip", "cc2dataset")
_FLOORS = ("decompression", "fastwarc")


def ours(path: Path, out: Path) -> int:
    """What a task of the stage does with a file. Rows: candidates."""
    with Candidates(out, ExtractSettings(), "CC-MAIN-2024-10", path.name) as candidates:
        wat.extract(path, candidates, lambda position: None)
    assert not candidates.stats.counts["bad_records"], "ours cannot read the benchmark's file"
    return candidates.stats.rows_out


def _work(side: str, path: Path, out: Path) -> tuple[float, float, int]:
    """CPU seconds, peak MB and rows of a side; in a process that does nothing else."""
    pa.set_cpu_count(1)
    pa.array([""])  # what Arrow loads once in a process, half a second, is not counted
    work: Callable[[Path, Path], int] = ours if side == "ours" else getattr(extract_peers, side)
    before = time.process_time()
    rows = work(path, out)
    return time.process_time() - before, memory_mb("VmHWM"), rows


def _apart(side: str, path: Path) -> tuple[float, float, int]:
    with (
        tempfile.TemporaryDirectory(prefix="openwit-extract-") as folder,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(_work, side, path, Path(folder) / "out").result()


def measure() -> Iterator[dict[str, Any]]:
    """A line a peer and floor, then one a size: the memory that ours takes."""
    size = int(os.environ.get("OPENWIT_EXTRACT_MB", "200")) << 20
    sizes = [size // 4, size, size * 2]
    with tempfile.TemporaryDirectory(prefix="openwit-extract-") as temporary:
        folder = Path(os.environ.get("OPENWIT_EXTRACT_FOLDER") or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            paths = extract_inputs.write(folder, sizes)
        except MissingInput as error:
            raise SystemExit(f"extract: {error}") from None
        yield from _speeds(paths[1])
        yield from _memory(paths)


def _speeds(path: Path) -> Iterator[dict[str, Any]]:
    sides = ("ours", *_PEERS, *_FLOORS)
    runs = [{side: _apart(side, path) for side in sides} for _ in range(_ROUNDS)]
    size = path.stat().st_size
    cpu = {side: min(run[side][0] for run in runs) for side in sides}
    for side in sides[1:]:
        yield {
            "name": "extract floor" if side in _FLOORS else "extract",
            "peer_name": side,
            "ours": round(size / cpu["ours"] / 2**20, 1),
            "peer": round(size / cpu[side] / 2**20, 1),
            "ratio": round(cpu[side] / cpu["ours"], 2),
            "unit": "compressed MB/s of a core",
            "bytes": size,
            "ours_rows": runs[0]["ours"][2],
            "peer_rows": runs[0][side][2],
            "ours_peak_mb": round(max(run["ours"][1] for run in runs)),
            "peer_peak_mb": round(max(run[side][1] for run in runs)),
        }


def _memory(paths: list[Path]) -> Iterator[dict[str, Any]]:
    least = 0.0
    for path in paths:
        _, peak, rows = _apart("ours", path)
        least = least or peak
        yield {
            "name": "extract memory",
            "ours": round(peak),
            "peer": round(least),
            "ratio": round(peak / least, 2),
            "unit": "peak MB; the peer is ours at the smallest size",
            "bytes": path.stat().st_size,
            "ours_rows": rows,
        }
