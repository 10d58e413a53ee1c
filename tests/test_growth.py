"""A run that grows: another cap, another snapshot; what is there is neither read nor fetched again.

The stages' own account is believed only so far: the first snapshot's texts are destroyed, too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline import recipe
from pipeline.config import ConfigError, load
from pipeline.stage import Run
from pipeline.stats import Stats
from tests import kill_nine
from tests.dataset_build.inline import InlineExecutor
from tests.test_end_to_end import CONFIG, TINY

SNAPSHOTS = ("CC-MAIN-2026-05", "CC-MAIN-2026-09")


def build(folder: Path, *overrides: str) -> InlineExecutor:
    """Build in this process; what ran."""
    config = load(recipe.Config, CONFIG, [*TINY, *overrides])
    executor = InlineExecutor()
    executor.advance(Run(folder, config), recipe.build_stages(config))
    return executor


def config_of(run: Path) -> recipe.Config:
    return load(recipe.Config, run / "config.yaml")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample web and its queries."""
    folder = tmp_path_factory.mktemp("base") / "run"
    build(folder, "until=queries")
    return folder


@pytest.fixture
def new_run(base: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A run of its own on the same web."""

    def copy(name: str) -> Path:
        shutil.copytree(base, tmp_path / name)
        return tmp_path / name

    return copy


def sources(*snapshots: str) -> list[str]:
    """Overrides that read the WAT files of some snapshots, and nothing else."""
    patterns = ",".join(f"sample_web:archive/*{name}*.wat.gz" for name in snapshots)
    return [f"extract.wat=[{patterns}]", "extract.warc=[]", "extract.pool=[]"]


def stats(run: Path, stage: str) -> Stats:
    manifests = Run(run, config_of(run)).manifests(stage)
    return sum((manifest.stats for manifest in manifests), Stats())


def reads(run: Path, stage: str) -> set[str]:
    """What the tasks of a stage read, as it is planned now."""
    planned = Run(run, config_of(run)).plan(stage)
    return {reference for task in planned for reference in task.task.reads}


def uids(run: Path, stage: str, pattern: str) -> set[bytes]:
    paths = sorted((run / stage / "out").glob(pattern))
    return {
        uid for path in paths for uid in pq.read_table(path, columns=["uid"])["uid"].to_pylist()
    }


def test_another_cap_matches_nothing_and_downloads_only_what_is_new(
    new_run: Callable[[str], Path],
) -> None:
    run, fresh = new_run("run"), new_run("fresh")
    build(run, "balance.cap=5")
    before = uids(run, "balance", "selected-*.parquet")
    executor = build(run, "balance.cap=12")
    assert {task.stage for task in executor.ran} == {"balance", "download", "screen", "pack"}
    selected = uids(run, "balance", "selected-*.parquet")
    assert len(selected) > len(before)
    counts = stats(run, "balance").counts
    assert (counts["came"], counts["went"]) == (len(selected - before), len(before - selected))
    counts = stats(run, "download").counts
    known = {uid[:8] for uid in before}
    assert counts["addresses"] == len({uid[:8] for uid in selected} - known) > 0
    assert counts["pairs_known"] == sum(uid[:8] in known for uid in selected)
    build(fresh, "balance.cap=12")
    assert kill_nine.digests(run) == kill_nine.digests(fresh)
    for cap in (5, 12):  # what is not selected now is kept all the same
        build(run, f"balance.cap={cap}")
        assert stats(run, "download").counts["addresses"] == 0
    assert kill_nine.digests(run) == kill_nine.digests(fresh)


def test_a_second_snapshot_never_reads_the_texts_of_the_first(
    new_run: Callable[[str], Path],
) -> None:
    run, fresh = new_run("run"), new_run("fresh")
    first, second = SNAPSHOTS
    build(run, *sources(first))
    before = uids(run, "balance", "selected-*.parquet")
    texts = [
        path
        for stage in ("extract", "match", "dedup")
        for path in (run / stage / "out").glob(f"*{first}*")
        if not path.name.startswith("found-")
    ]
    assert len(texts) >= 3
    for path in texts:
        with path.open("r+b") as stream:
            stream.write(bytes(path.stat().st_size))
    build(run, *sources(first, second))
    merged = {name for name in reads(run, "dedup") if name.startswith("dedup:")}
    assert {name.partition("-")[0] for name in merged} == {"dedup:found"}
    assert all(not name.startswith("dedup:texts") for name in reads(run, "balance"))
    selected = uids(run, "balance", "selected-*.parquet")
    assert before - selected, "the cap is meant to bite more with more pairs"
    counts = stats(run, "download").counts
    known = {uid[:8] for uid in before}
    assert counts["addresses"] == len({uid[:8] for uid in selected} - known)
    build(fresh, *sources(first, second))
    assert kill_nine.digests(run) == kill_nine.digests(fresh)


def test_downloads_that_fail_are_made_up_for(new_run: Callable[[str], Path]) -> None:
    """With `spare`, queries stand at the cap in the end for which enough pictures were there."""
    cap, run = 12, new_run("run")
    build(run, "balance.spare=0.5")
    coverage = pq.read_table(run / "balance/out/coverage.parquet").to_pydict()
    assert max(coverage["selected"]) == 18
    kept = dict.fromkeys(coverage["query_id"], 0)
    survivors = dict.fromkeys(coverage["query_id"], 0)
    over_selected: dict[bytes, list[int]] = {}
    for path in (run / "balance/out").glob("selected-*.parquet"):
        for row in pq.read_table(path, columns=["uid", "selected_by"]).to_pylist():
            over_selected[row["uid"]] = row["selected_by"]
    for path in (run / "screen/out").glob("screened-*.parquet"):
        for row in pq.read_table(path).to_pylist():
            if row["reason"] in ("", "over_cap"):
                for query in over_selected[row["uid"]]:
                    survivors[query] += 1
            for query in row["selected_by"]:
                kept[query] += row["keep"]
    assert kept == {query: min(number, cap) for query, number in survivors.items()}
    assert sum(number > cap for number in survivors.values()) > 10
    index = pq.read_table(run / "pack/out/index.parquet").to_pydict()
    packed = dict.fromkeys(coverage["query_id"], 0)
    for queries in index["selected_by"]:
        for query in queries:
            packed[query] += 1
    assert packed == kept


def test_a_snapshots_name_is_a_part_of_files_names() -> None:
    with pytest.raises(ConfigError, match=r"extract\.snapshot"):
        load(recipe.Config, CONFIG, ["extract.snapshot=a/b"])
