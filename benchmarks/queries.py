"""500,000 queries from a dump of 0.2, 0.5 and 2 GB of XML, a day of page views, and WordNet.

The stage runs as it does in a build, two tasks at a time, each in its own process. The smallest
dump is counted in 1, 2 and 16 tasks and once more, the others in tasks as large as one of 16 is of
the largest: what a task holds must not grow with the dump. Thresholds are those of a build at 2 GB,
and less for less. `OPENWIT_QUERIES_GB=0.2,2` measures other sizes, `OPENWIT_QUERIES_TASKS=2,16` the
smallest in other numbers of tasks; inputs are kept in `OPENWIT_QUERIES_FOLDER`, if that is set.
"""

from __future__ import annotations

import hashlib
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import queries_inputs
from benchmarks.match_inputs import WORDNET
from dataset_build.queries import STAGE, QueriesSettings
from pipeline import runner
from pipeline.config import MissingInput
from pipeline.local import LocalExecutor
from pipeline.manifest import Manifest
from pipeline.recipe import Config
from pipeline.stage import Run
from pipeline.stop import StopFlag

TITLES = 1_000_000  # viewed in a day
WORKERS = 2
_FULL = 2_000_000_000  # bytes of XML that the stage's own thresholds are for
_LISTS = ("queries.parquet", "wordnet.parquet")


def _pass(dump: Path, views: list[Path], xml_bytes: int, bytes_per_task: int) -> dict[str, Any]:
    """Build the list in a new run folder."""
    usual = QueriesSettings()
    share = min(1.0, xml_bytes / _FULL)
    config = Config.model_validate(
        {
            "local": {"workers": WORKERS},
            "queries": {
                "wikipedia": [str(dump)],
                "page_views": [str(path) for path in views],
                "wordnet": [str(WORDNET)],
                "bytes_per_task": bytes_per_task,
                "min_word_count": max(2, round(usual.min_word_count * share)),
                "min_bigram_count": max(2, round(usual.min_bigram_count * share)),
            },
        }
    )
    stop = StopFlag()
    with tempfile.TemporaryDirectory(prefix="openwit-queries-") as folder:
        run = Run(Path(folder), config)
        executor = LocalExecutor(config.local, stop)
        cpu, began = _children_cpu(), time.monotonic()
        runner.advance(run, [STAGE], executor, stop, runner.Unwatched())
        wall = time.monotonic() - began
        done = run.manifests("queries")
        listed = {
            output.name: output.sha256
            for manifest in done
            for output in manifest.outputs
            if output.name in _LISTS
        }
    dumps = [manifest for manifest in done if manifest.stats.counts["words_read"]]
    viewed = [manifest for manifest in done if manifest.stats.counts["view_lines"]]
    *_, assembly = done
    return {
        "tasks": len(dumps),
        "queries": assembly.stats.rows_out,
        "admitted_by": assembly.stats.histograms["admitted_by"],
        "cut_off": assembly.stats.histograms.get("cut_off", {}),
        "wall_s": round(wall, 1),
        "cpu_s": round(_children_cpu() - cpu, 1),
        "dump_mb": _peak(dumps),
        "views_mb": _peak(viewed),
        "assembly_mb": _peak([assembly]),
        "assembly_s": round(assembly.seconds, 1),
        "sha256": hashlib.sha256("".join(listed[name] for name in _LISTS).encode()).hexdigest(),
    }


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _peak(manifests: list[Manifest]) -> int:
    return round(max((manifest.memory_mb for manifest in manifests), default=0))


def _measure(folder: Path) -> Iterator[dict[str, Any]]:
    sizes = [float(size) for size in os.environ.get("OPENWIT_QUERIES_GB", "0.2,0.5,2").split(",")]
    tasks = [int(n) for n in os.environ.get("OPENWIT_QUERIES_TASKS", "1,2,16,16").split(",")]
    views = queries_inputs.write_page_views(folder, TITLES)
    per_gb: float | None = None
    for gigabytes in sizes:
        xml_bytes = int(gigabytes * 1e9)
        place = folder / f"{xml_bytes}"
        place.mkdir(exist_ok=True)
        dump = queries_inputs.write_dump(place, xml_bytes)
        size = dump.stat().st_size
        whole = max(tasks) * xml_bytes / (max(sizes) * 1e9)
        digests = set()
        for number in tasks if gigabytes == min(sizes) else [max(1, round(whole))]:
            result = _pass(dump, views, xml_bytes, -(-size // number))
            digests.add(result.pop("sha256"))
            cost = result["cpu_s"] / gigabytes
            per_gb = per_gb or cost
            yield {
                "name": "queries",
                "xml_gb": gigabytes,
                "bz2_bytes": size,
                "titles": TITLES,
                **result,
                "same_bytes": len(digests) == 1,
                "ours": round(cost, 1),
                "peer": round(per_gb, 1),
                "ratio": round(per_gb / cost, 2),
                "unit": "CPU s a GB of XML; the peer is the first pass",
            }


def measure() -> Iterator[dict[str, Any]]:
    """A line a pass."""
    if not any(WORDNET.glob("data.*")):
        raise MissingInput(f"{WORDNET} has no data.*: install Debian's wordnet-base")
    if kept := os.environ.get("OPENWIT_QUERIES_FOLDER"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        yield from _measure(Path(kept))
    else:
        with tempfile.TemporaryDirectory(prefix="openwit-queries-") as folder:
            yield from _measure(Path(folder))
