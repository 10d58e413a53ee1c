"""match, dedup and balance on 1, 3, 10 and 30 million candidates: time and memory as data grows.

The candidates are generated: words by a Zipf law, a tenth of them repeated, four addresses for
three captions. The stages run as they do in a build, two tasks at a time, each in its own process.
`OPENWIT_SCALE=1,3` measures other sizes, in millions.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_build import balance, dedup, match, records
from pipeline import runner
from pipeline.local import LocalExecutor
from pipeline.manifest import publish
from pipeline.recipe import Config
from pipeline.stage import Planned, Run, Task
from pipeline.stats import Stats
from pipeline.stop import StopFlag

QUERIES = 500_000
WORKERS = 2
_WORDS = 200_000
_FILE = 1_000_000  # candidates a file
_SYLLABLES = re.findall("..", "bakotiramesodalinovoquesinpetaroricafelushu")
_CHANCE = np.cumsum(1 / np.arange(1, _WORDS + 1))

Numbers = npt.NDArray[np.int64]


def vocabulary() -> pa.Array:
    """Made-up words of two to five syllables, the frequent ones short."""
    words = []
    for number in range(len(_SYLLABLES), len(_SYLLABLES) + _WORDS):
        word = ""
        while number:
            number, syllable = divmod(number, len(_SYLLABLES))
            word += _SYLLABLES[syllable]
        words.append(word)
    return pa.array(words)


def _phrases(words: pa.Array, rng: np.random.Generator, lengths: Numbers) -> pa.Array:
    """Texts of so many words each."""
    columns = []
    for place in range(int(lengths.max())):
        drawn = np.searchsorted(_CHANCE, rng.random(lengths.size) * _CHANCE[-1])
        columns.append(words.take(pa.array(drawn, mask=place >= lengths)))
    return pc.binary_join_element_wise(*columns, " ", null_handling="skip")


def queries(words: pa.Array) -> pa.Array:
    """`QUERIES` different phrases of one to four words."""
    rng = np.random.default_rng(0)
    found = words
    while len(found) < QUERIES:
        more = _phrases(words, rng, rng.choice([2, 2, 2, 3, 3, 4], 400_000))
        found = pa.chunked_array([found, more]).unique()
    return found.slice(0, QUERIES)


def candidates(words: pa.Array, number: int) -> pa.Table:
    """File `number` of the candidates."""
    rng = np.random.default_rng([1, number])
    text = _phrases(words, rng, np.minimum(rng.poisson(8, _FILE) + 1, 20))
    picture = np.arange(_FILE) * 4 // 3 + number * 4 * _FILE // 3
    site = np.searchsorted(_CHANCE, rng.random(_FILE) * _CHANCE[-1])
    names = [pa.array(n).cast(pa.string()) for n in (site, picture)]
    page = pc.binary_join_element_wise("https://www.site", names[0], ".example/", "")
    url = pc.binary_join_element_wise(page, "images/", names[1], ".jpg", "")
    repeated = np.arange(_FILE)
    again = rng.random(_FILE) < 0.1
    repeated[again] = rng.integers(0, _FILE, int(again.sum()))
    table = pa.table({"url": url, "text": text, "page_url": page}).take(pa.array(repeated))
    for name, value in (("source", "alt"), ("snapshot", "S"), ("file", f"{number:05d}")):
        table = table.append_column(name, pa.repeat(value, _FILE))
    return table.cast(records.CANDIDATES)


def _publish(run: Run, stage: str, number: int, name: str, table: pa.Table) -> Planned:
    """Make a file the output of a task of an earlier stage."""
    task = Planned(Task(stage, number), f"{number:016x}")
    folder = run.stage_folder(stage) / "store" / f"{number:05d}"
    folder.mkdir(parents=True)
    pq.write_table(table, folder / name, compression="zstd", row_group_size=1 << 16)
    stats = Stats(table.num_rows, table.num_rows)
    publish(
        run.stage_folder(stage),
        folder,
        index=number,
        fingerprint=task.fingerprint,
        stats=stats,
        seconds=0,
        attempt=1,
    )
    return task


def _measure(millions: int, folder: Path) -> dict[str, Any]:
    words = vocabulary()
    config = Config.model_validate({"local": {"workers": WORKERS}})
    run = Run(folder, config)
    listed = pa.table({"text": (names := queries(words)), "norm": names})
    run.save_plan("queries", [_publish(run, "queries", 0, "queries.parquet", listed)])
    files = millions * 1_000_000 // _FILE
    planned = [
        _publish(run, "extract", n, f"candidates-S-{n:05d}.parquet", candidates(words, n))
        for n in range(files)
    ]
    run.save_plan("extract", planned)
    assert len(run.find("extract:candidates-*.parquet")) == files
    stop = StopFlag()
    result: dict[str, Any] = {"name": "scale", "candidates": millions * 1_000_000}
    result |= {"queries": QUERIES, "workers": WORKERS, "unit": "s, MB a process"}
    executor = LocalExecutor(config.local, stop)
    for stage in (match.STAGE, dedup.STAGE, balance.STAGE):
        began = time.monotonic()
        runner.advance(run, [stage], executor, stop, runner.Unwatched())
        wall = time.monotonic() - began
        done = run.manifests(stage.name)
        stats = sum((manifest.stats for manifest in done), Stats())
        busy = sum(manifest.seconds for manifest in done)
        result |= {
            f"{stage.name}_s": round(wall, 1),
            f"{stage.name}_mb": round(max(manifest.memory_mb for manifest in done)),
            f"{stage.name}_rows": stats.rows_in,
            f"{stage.name}_rows_per_s_core": round(stats.rows_in / busy),
        }
    result["selected"] = stats.rows_out
    return result


def measure() -> Iterator[dict[str, Any]]:
    """A line a size; the peer is the smallest size's time, as it would be if it grew linearly."""
    sizes = [int(size) for size in os.environ.get("OPENWIT_SCALE", "1,3,10,30").split(",")]
    first = None
    for millions in sizes:
        with tempfile.TemporaryDirectory(prefix="openwit-scale-") as folder:
            result = _measure(millions, Path(folder))
        total = sum(result[f"{name}_s"] for name in ("match", "dedup", "balance"))
        first = first or total / millions
        ratio = round(first * millions / total, 2)
        yield {
            **result,
            "ours": round(total, 1),
            "peer": round(first * millions, 1),
            "ratio": ratio,
        }
