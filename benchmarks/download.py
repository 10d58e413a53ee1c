"""The download task against stock img2dataset: the same photographs, settings and connections.

Each side is a process of its own, in turns; nginx serves over loopback. What counts is processor
seconds of the side's process and its children, past what a download of a single address takes right
before: to start takes the peer as long as thousands of pictures do. Every guard is on; only the
limit of connections per domain is raised. `OPENWIT_DOWNLOAD=http:16,https:64` takes some of the
settings.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import download_sides, download_web
from pipeline import recipe, runner
from pipeline.stage import Planned, Run
from pipeline.stop import StopFlag

ROOT = Path(__file__).parent.parent
SETTINGS = tuple(f"{scheme}:{n}" for scheme in ("http", "https") for n in (16, 64, 256))
PICTURES = {"http": 4000, "https": 1000}  # the peer takes many times as long for https
HOSTS = 200
ROUNDS = 5
SIDES = ("ours", "peer")


@dataclass(frozen=True)
class Cost:
    """Of one process and its children."""

    wall_s: float
    cpu_s: float
    whole_cpu_s: float
    """With the start, where `cpu_s` is without."""
    peak_mb: float
    """Memory of the largest process."""


def measure() -> Iterator[dict[str, Any]]:
    """Pictures for a core-second at 16, 64 and 256 connections, over http and https."""
    wanted = os.environ.get("OPENWIT_DOWNLOAD", ",".join(SETTINGS)).split(",")
    with (
        tempfile.TemporaryDirectory(prefix="openwit-download-") as name,
        download_web.serve(Path(name)) as web,
    ):
        for scheme, pictures in PICTURES.items():
            numbers = [int(s.partition(":")[2]) for s in wanted if s.startswith(f"{scheme}:")]
            if not numbers:
                continue
            one, many = (_prepare(web, scheme, count) for count in (1, pictures))
            for connections in numbers:
                yield _line(scheme, connections, _rounds(web, one, many, scheme, connections))


def _line(scheme: str, connections: int, rounds: list[dict[str, Cost]]) -> dict[str, Any]:
    """Medians over the rounds; a ratio is that of two runs one after the other."""
    pictures = PICTURES[scheme]

    def typical(number: Callable[[dict[str, Cost]], float], digits: int = 2) -> float:
        return round(median(map(number, rounds)), digits)

    ratios = sorted(costs["peer"].cpu_s / costs["ours"].cpu_s for costs in rounds)
    return {
        "name": f"download: {scheme}, {connections} connections",
        "peer_name": f"img2dataset {version('img2dataset')}",
        "ours": typical(lambda costs: pictures / costs["ours"].cpu_s, 1),
        "peer": typical(lambda costs: pictures / costs["peer"].cpu_s, 1),
        "ratio": round(median(ratios), 2),
        "ratio_least": round(ratios[0], 2),
        "ratio_most": round(ratios[-1], 2),
        "unit": "pictures/core-second",
        "ratio_wall": typical(lambda costs: costs["peer"].wall_s / costs["ours"].wall_s),
        "ratio_with_start": typical(
            lambda costs: costs["peer"].whole_cpu_s / costs["ours"].whole_cpu_s
        ),
        "ours_peak_mb": typical(lambda costs: costs["ours"].peak_mb, 0),
        "peer_peak_mb": typical(lambda costs: costs["peer"].peak_mb, 0),
        "ratio_memory": typical(lambda costs: costs["ours"].peak_mb / costs["peer"].peak_mb),
        "pictures": pictures,
        "hosts": HOSTS,
    }


def _prepare(web: download_web.Web, scheme: str, count: int) -> Path:
    """A folder with the addresses for both sides, and our run built up to the download."""
    folder = web.folder / f"{scheme}-{count}"
    folder.mkdir()
    urls = web.urls(scheme, count, HOSTS)
    texts = [f"a photo, number {number}" for number in range(count)]
    pq.write_table(pa.table({"url": urls, "text": texts}), folder / "pool.parquet")
    (folder / "queries.txt").write_text("photo\n")
    settings = recipe.Config.model_validate(
        {**download_sides.config(folder, 1), "until": "balance"}
    )
    for stage in recipe.build_stages(settings):
        planned: list[Planned] = []
        for phase in range(1 + len(stage.then)):
            run = Run(folder / "run", settings)  # anew: it remembers what was published
            added = stage.planned(run, phase, len(planned))
            planned += added
            run.save_plan(stage.name, planned)
            for task in added:
                runner.work_on(run, stage, task, 1, StopFlag())
    return folder


def _rounds(
    web: download_web.Web, one: Path, many: Path, scheme: str, connections: int
) -> list[dict[str, Cost]]:
    """What the pictures of `many` cost each side, round by round, without the start."""
    rounds: list[dict[str, Cost]] = []
    for _ in range(ROUNDS):
        rounds.append({})
        for side in SIDES:
            start = _cost(web, side, one, scheme, connections)
            whole = _cost(web, side, many, scheme, connections)
            for folder, wanted in ((one, 1), (many, PICTURES[scheme])):
                found = download_sides.pictures(folder, side)
                assert found == wanted, f"{side}: {found} of {wanted} pictures"
            rounds[-1][side] = Cost(
                whole.wall_s - start.wall_s,
                whole.cpu_s - start.cpu_s,
                whole.cpu_s,
                whole.peak_mb,
            )
    return rounds


def _cost(web: download_web.Web, side: str, folder: Path, scheme: str, connections: int) -> Cost:
    """What one download takes. Raises `RuntimeError` with its output if it fails."""
    port = web.ports[scheme]
    environment = {
        **os.environ,
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "SSL_CERT_FILE": str(web.authorities),
        "OPENWIT_CONNECT_TO": f".example=127.0.0.1:{port}",
        "OPENWIT_BENCHMARK_PORT": str(port) if side == "peer" else "",
    }
    command = [sys.executable, "-m", "benchmarks.download_sides", side]
    command += [str(folder), str(connections)]
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{side}: {output.read().decode()[-4000:]}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Cost(wall_s, cpu_s, cpu_s, usage.ru_maxrss / 1024)
