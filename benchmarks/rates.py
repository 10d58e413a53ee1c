"""What each kind of task costs on this machine: writes pipeline/rates.json, for `plan`.

Five parts, each a run or two that is made for it; `OPENWIT_RATES=pool,archive` measures some and
leaves the others as they are. Tasks are as large as a cluster's where that takes seconds, and of
two sizes or more, so that what a task takes at least and what grows with it can be told apart.

- pool: 500,000 queries and up to 2 million generated candidates, from extract to balance
- archive: WARC and WAT files of generated pages with the links of real ones; real pages and a real
  dump too where `$OPENWIT_DATA` has them
- pictures: pictures of 256 to 512 pixels served over loopback, download, their look and pack
- tables: the rest of screen and the end of pack, on tables of generated pairs
- training: the preset `cpu`

What cannot be measured without the internet or other people's clusters is in `REFERENCE`.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks import rates_tables, scale
from dataset_build.forecast import pilot
from pipeline import rates, recipe, runner
from pipeline.local import LocalExecutor
from pipeline.rates import Figure, Observation, Rates
from pipeline.stage import Run
from pipeline.stop import StopFlag
from train import cost
from train.stages import TRAIN

REFERENCE = {
    "extract.wat.rows_per_byte": Figure(
        88e9 / 5e6 / (18.5 * 2**40 / 56_320),
        "reference: cc2dataset, 88 billion different candidates in 5 million WAT files, of 344 MiB",
    ),
    "extract.wat.file_bytes": Figure(
        18.5 * 2**40 / 56_320, "reference: CC-MAIN-2018-39, 56,320 WAT files of 18.5 TiB"
    ),
    "candidate_bytes": Figure(
        133.0,
        "reference: rows of real addresses and captions with their page, as compressed parquet",
    ),
    "match.share": Figure(0.5, "reference: MetaCLIP, half of the English texts contain a query"),
    "balance.share": Figure(
        0.25, "reference: MetaCLIP, 1.6 billion matched pairs to 400 million; at that size only"
    ),
    "balance.capped_queries": Figure(
        16_000 / 500_000, "reference: MetaCLIP, 16,000 of 500,000 queries have over 20,000 pairs"
    ),
    "download.share": Figure(
        0.77, "reference: img2dataset's users, 2023, with one retry; DataComp had 0.42 of old links"
    ),
    "download.network_s": Figure(
        16 / 1350, "reference: img2dataset, 1,350 pictures a second of 16 processes"
    ),
    "download.received_bytes": Figure(
        130e3, "reference: img2dataset, 130 MB/s for 1,000 pictures a second"
    ),
    "picture_bytes": Figure(29.9e3, "reference: img2dataset, 29.9 GB a million, 256 x 256, q95"),
}
"""Figures of the world, from others' papers and pages."""


def measure() -> Iterator[dict[str, Any]]:
    """Measure the parts and write the file; a line for each kind of task."""
    wanted = os.environ.get("OPENWIT_RATES", ",".join(_PARTS)).split(",")
    for name in wanted:
        with tempfile.TemporaryDirectory(prefix="openwit-rates-") as folder:
            found = _PARTS[name](Path(folder))
        before = rates.shipped() if rates.SHIPPED.exists() else Rates()
        figures = {**found.figures, **REFERENCE}
        merged = Rates(found.kinds, figures).over(before)
        rates.SHIPPED.write_text(merged.to_json())
        for kind, rate in found.kinds.items():
            yield {
                "name": "rates",
                "kind": kind,
                "fixed_s": round(rate.seconds.fixed, 3),
                "us_per_unit": round(1e6 * rate.seconds.per_unit, 4),
                "unit": rate.unit,
                "tasks": rate.tasks,
                "most_units": rate.most_units,
            }


def _build(folder: Path, config: dict[str, Any], stages: str = "pack") -> Run:
    """A run of its own, built up to a stage, as many tasks at a time as there are cores."""
    settings = recipe.Config.model_validate({**config, "until": stages})
    run = Run(folder, settings)
    stop = StopFlag()
    executor = LocalExecutor(settings.local, stop)
    runner.advance(run, recipe.build_stages(settings), executor, stop, runner.Unwatched())
    return run


def _fitted(runs: list[Run], part: str, keep: Callable[[str], bool]) -> Rates:
    """Rates and figures of some runs; `keep`: the kinds of task that the part is for."""
    seen: list[Observation] = []
    figures: dict[str, Figure] = {}
    source = _source(part)
    for run in runs:
        seen += [task for task in pilot.observations(run) if keep(task.kind)]
        figures |= pilot.figures(run, "our runs")
    figures = {name: Figure(figure.value, source) for name, figure in figures.items()}
    return Rates(rates.fit(seen, {}, source), figures)


def _assumed(found: Rates, names: tuple[str, ...], where: str) -> dict[str, Figure]:
    """Figures that are of our data, and stand in for those of the web."""
    source = f"assumed: as in our {where}; a run of your own knows better (--from)"
    return {name: Figure(found.figures[name].value, source) for name in names}


def _source(part: str) -> str:
    machine = f"{os.cpu_count()} cores of {_processor()}"
    return f"measured by us: python -m benchmarks rates, {part}, on {machine}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _pool(folder: Path) -> Rates:
    words = scale.vocabulary()
    queries = scale.queries(words)
    (folder / "queries.txt").write_text("\n".join(queries.to_pylist()))
    runs = []
    sizes = {"tiny": (2000,), "small": (50_000, 150_000), "large": (1_000_000, 500_000, 250_000)}
    for size, files in sizes.items():
        inputs = folder / f"pool-{size}"
        inputs.mkdir()
        for number, rows in enumerate(files):
            table = scale.candidates(words, number).slice(0, rows).select(["url", "text"])
            pq.write_table(table, inputs / f"{number:05d}.parquet", row_group_size=1 << 16)
        config = {
            "queries": {"file": [str(folder / "queries.txt")], "limit": scale.QUERIES},
            "extract": {"pool": [f"{inputs}/*.parquet"], "min_words": 1},
            "dedup": {"buckets_per_task": 64 if size == "small" else 16},
            "balance": {"cap": 1000},
        }
        runs.append(_build(folder / size, config, "balance"))
    stages = ("extract.pool", "queries.assemble", "match.", "dedup.", "balance.")
    found = _fitted(runs, "pool", lambda kind: kind.startswith(stages))
    names = ("dedup.share", "dedup.snapshot_share", "extract.pool.rows_per_byte")
    return Rates(found.kinds, _assumed(found, names, "generated pool, a tenth of it repeated"))


def _archive(folder: Path) -> Rates:
    inputs = folder / "crawl"
    inputs.mkdir()
    rng = np.random.default_rng(0)
    for number, pages in enumerate((1000, 4000, 8000)):
        _write_wat(inputs / f"{number}.warc.wat.gz", pages, rng)
    (folder / "queries.txt").write_text("red\n")
    queries: dict[str, Any] = {"file": [str(folder / "queries.txt")]}
    config: dict[str, Any] = {
        "queries": queries,
        "extract": {"wat": [f"{inputs}/*.wat.gz"]},
    }
    runs = [_build(folder / "wat", config, "extract")]
    assert pilot.total(runs[0].manifests("extract")).rows_out == 13_000, "a candidate a page"
    for articles in (120, 480):
        settings = {"pairs": 1000, "articles": articles, "hours": 3, "archive_files": 1}
        web = {
            "sample_web": settings,
            "queries": {
                "wikipedia": ["sample_web:encyclopedia.xml.bz2"],
                "page_views": [str(_page_views(folder, 500 * articles))],
            },
            "extract": {"warc": ["sample_web:archive/*.warc.gz"]},
        }
        runs.append(_build(folder / f"web-{articles}", web, "extract"))
    if (data := os.environ.get("OPENWIT_DATA")) is not None:
        real = {
            "queries": {"wikipedia": [f"{data}/wikipedia/*.xml.bz2"], "min_bigram_count": 8},
            "extract": {"warc": [f"{data}/webarchive/news-*.warc.gz"]},
        }
        runs.append(_build(folder / "real", real, "extract"))
    kinds = ("extract.wat", "extract.warc", "queries.wikipedia", "queries.page_views")
    found = _fitted(runs, "archive", lambda kind: kind.startswith(kinds))
    return Rates(found.kinds, _assumed(found, ("extract.warc.rows_per_byte",), "archives"))


def _page_views(folder: Path, titles: int) -> Path:
    """An hour of page views of made-up titles."""
    lines = (f"en Title_{number}_of_many {number % 97} 0\n" for number in range(titles))
    path = folder / f"pageviews-20260105-{titles % 24:02d}0000.gz"
    path.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    return path


_LINKS = 60  # a page; with one picture that has a text, about as many as Common Crawl's pages have


def _write_wat(path: Path, pages: int, rng: np.random.Generator) -> None:
    """Metadata of generated pages: a member each, most of it links, one picture with a text."""
    vocabulary = scale.vocabulary().to_pylist()
    drawn = rng.integers(0, len(vocabulary), (pages, _LINKS * 4 + 8))
    with path.open("wb") as out:
        for page in range(pages):
            words = [vocabulary[place] for place in drawn[page]]
            host = f"https://www.{words[0]}{words[1]}.example"
            links: list[dict[str, str]] = [
                {
                    "path": "A@/href",
                    "url": f"/{words[at]}/{words[at + 1]}-{words[at + 2]}",
                    "text": f"{words[at + 2]} {words[at + 3]}",
                }
                for at in range(0, _LINKS * 4, 4)
            ]
            alt = " ".join(words[-8:])
            links.append({"path": "IMG@/src", "url": f"/images/{page}.jpg", "alt": alt})
            links.append({"path": "IMG@/src", "url": "/logo.png"})
            metadata = {"Links": links, "Head": {"Title": alt}}
            http = {"Response-Message": {"Status": "200"}, "HTML-Metadata": metadata}
            envelope = {
                "WARC-Header-Metadata": {"WARC-Target-URI": f"{host}/{page}"},
                "Payload-Metadata": {"HTTP-Response-Metadata": http},
            }
            body = json.dumps({"Envelope": envelope}).encode()
            head = (
                f"WARC/1.0\r\nWARC-Type: metadata\r\nWARC-Target-URI: {host}/{page}\r\n"
                f"WARC-Date: 2026-01-24T11:00:00Z\r\nWARC-Record-ID: <urn:uuid:{page:032x}>\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            out.write(gzip.compress(head.encode() + body + b"\r\n\r\n", 6, mtime=0))


def _pictures(folder: Path) -> Rates:
    runs = []
    for pairs in (500, 2000):
        config = {
            "sample_web": {
                "pairs": pairs,
                "dirt": 0,
                "shortest_side": 256,
                "longest_side": 512,
                "articles": 120,
                "hours": 1,
                "archive_files": 1,
            },
            "queries": {"wordnet": ["sample_web:wordnet/data.*"]},
            "extract": {"pool": ["sample_web:pool.parquet"], "warc": [_WARC_FILES]},
            "download": _OUR_SERVER,
        }
        runs.append(_build(folder / str(pairs), config))
    kinds = ("download.", "screen.look", "pack.shard")
    found = _fitted(runs, "pictures", lambda kind: kind.startswith(kinds))
    figures = _assumed(found, ("screen.share", "download.requests"), "sample web")
    return Rates(
        found.kinds, {**figures, **{name: found.figures[name] for name in ("start_s", "stage_s")}}
    )


_WARC_FILES = "sample_web:archive/*.warc.gz"
_OUR_SERVER: dict[str, Any] = {
    "polite_connections": 16,
    "requests_per_s": None,
    "allow_networks": ["127.0.0.0/8"],
}


def _tables(folder: Path) -> Rates:
    seen, pass_s, figures = rates_tables.observed(folder)
    source = _source("tables")
    found = rates.fit(seen, {}, source)
    figures["screen.pass_share"] = pass_s / found["screen.decide"].seconds.per_unit
    return Rates(found, {name: Figure(value, source) for name, value in figures.items()})


def _training(folder: Path) -> Rates:
    train = {"preset": "cpu", "samples": 2560}
    config = {
        "sample_web": {"pairs": 2000, "dirt": 0, "articles": 120, "hours": 1},
        "queries": {"wordnet": ["sample_web:wordnet/data.*"]},
        "extract": {"pool": ["sample_web:pool.parquet"], "warc": [_WARC_FILES]},
        "download": {**_OUR_SERVER, "image_size": 72},
        "train": train,
    }
    run = _build(folder / "run", config)
    stop = StopFlag()
    executor = LocalExecutor(run.settings("local"), stop)
    runner.advance(run, [TRAIN], executor, stop, runner.Unwatched())
    found = cost.figures(run, "our run")
    source = _source("training") + ", preset cpu"
    return Rates({}, {name: Figure(one.value, source) for name, one in found.items()})


_PARTS = {
    "pool": _pool,
    "archive": _archive,
    "pictures": _pictures,
    "tables": _tables,
    "training": _training,
}
