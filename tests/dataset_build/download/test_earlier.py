"""What was fetched once is taken over, whatever is selected, and however it is cut into tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dataset_build import download
from dataset_build.download import shard
from dataset_build.download.earlier import Earlier
from dataset_build.lists import ListSettings, ListsSettings
from pipeline import manifest
from pipeline.stage import Run
from pipeline.stats import Stats
from tests.dataset_build.hand_made import Pair, balance_of, dedup_of
from tests.dataset_build.inline import InlineExecutor

from .conftest import HostileWeb
from .downloads import Downloads, asked, failing, pictures, timeless


@pytest.fixture
def select(
    tmp_path: Path, web: HostileWeb, inline: InlineExecutor, monkeypatch: pytest.MonkeyPatch
) -> Downloads:
    monkeypatch.setenv("OPENWIT_CONNECT_TO", web.connect_to)
    return Downloads(tmp_path / "run", web, inline)


FIRST = pictures(*range(14)) + failing(0, 1, 2)
MORE = pictures(*range(14, 24)) + failing(3, 4)


@pytest.fixture
def grown(select: Downloads) -> Downloads:
    """FIRST was downloaded, then FIRST and MORE."""
    assert select(FIRST, FIRST + MORE) == asked(FIRST)
    assert select(FIRST + MORE) == asked(MORE)
    return select


def test_a_larger_selection_asks_for_what_is_new(select: Downloads) -> None:
    assert select(FIRST, FIRST + MORE) == asked(FIRST)
    before, tars = select.outcomes, select.tars()
    assert select.stats.counts["pairs_known"] == 0
    assert select(FIRST + MORE) == asked(MORE)
    after = select.outcomes
    assert {key: after[key] for key in before} == before
    assert select.stats.counts["pairs_known"] == len(FIRST)
    assert select.stats.counts["addresses"] == len(MORE)
    assert select.stats.counts["pictures"] == 10
    assert (select.stats.rows_in, select.stats.rows_out) == (len(FIRST + MORE), 24)
    assert select.stats.dropped == {"dead_link": 5}
    grown = select.tars()
    assert {name: grown[name] for name in tars} == tars  # the very inodes: links, not copies
    assert len(grown) > len(tars)
    select.check_pictures()


def test_going_back_and_forth_asks_for_nothing(grown: Downloads) -> None:
    after, tars = grown.outcomes, grown.tars()
    assert grown(FIRST, FIRST + MORE) == []
    assert {row["uid"] for row in grown.rows("unused")} == {pair.uid for pair in MORE}
    assert grown.tars() == tars
    assert (grown.stats.rows_in, grown.stats.rows_out) == (len(FIRST), 14)
    grown.check_pictures()
    assert grown(pictures(30), FIRST + MORE + pictures(30)) == ["/picture/30"]
    assert grown(FIRST + MORE) == []
    assert grown.outcomes == after
    assert {row["uid"] for row in grown.rows("unused")} == {pair.uid for pair in pictures(30)}
    grown.check_pictures()


@pytest.mark.parametrize(
    "other", [{"image_size": 32}, {"max_bytes": 1 << 20}, {"user_agent": "other/1"}]
)
def test_other_settings_fetch_everything_again(select: Downloads, other: dict[str, Any]) -> None:
    select(FIRST)
    before = timeless(select.outcomes)
    assert select(FIRST, **other) == asked(FIRST)
    assert select.stats.counts["pairs_known"] == 0
    heights = {row["height"] for row in select.outcomes.values() if row["status"] == "ok"}
    assert heights == ({32} if "image_size" in other else {48})
    assert (timeless(select.outcomes) == before) == ("image_size" not in other)


@pytest.mark.parametrize(
    "other", [{"threads": 1}, {"polite_connections": 1}, {"contact": "me@lab.example"}]
)
def test_operational_settings_do_not(select: Downloads, other: dict[str, Any]) -> None:
    select(FIRST)
    assert select(FIRST + MORE, **other) == asked(MORE)


@pytest.mark.parametrize("pairs_per_task", [1, 5, 1000])
def test_other_ranges_ask_for_nothing(grown: Downloads, pairs_per_task: int) -> None:
    before, tars, tasks = grown.outcomes, grown.tars(), len(grown.run.plan("download"))
    assert grown(FIRST + MORE, pairs_per_task=pairs_per_task) == []
    assert len(grown.run.plan("download")) == -(-len(FIRST + MORE) // pairs_per_task) != tasks
    assert grown.outcomes == before
    assert grown.tars() == tars
    grown.check_pictures()
    assert grown(FIRST, FIRST + MORE) == []
    assert grown(FIRST + MORE + pictures(30), pairs_per_task=pairs_per_task) == ["/picture/30"]
    assert {key: grown.outcomes[key] for key in before} == before


def test_another_caption_of_an_address_takes_its_outcome(select: Downloads) -> None:
    select(FIRST)
    before = select.outcomes
    captions = [Pair(pair.url, "another") for pair in FIRST]
    assert select(captions, FIRST + captions) == []
    after = select.outcomes
    differ = {"uid", "text"}
    for key, row in before.items():
        assert {n for n in row if row[n] != after[key][n]} == differ
    select.check_pictures()
    assert select(FIRST + captions) == []
    assert select.stats.counts["pairs_known"] == 2 * len(FIRST)


def spoil(path: Path) -> None:
    """Other bytes, the same size, so that nobody takes the file for lost."""
    path.write_bytes(b"#" * path.stat().st_size)


def test_texts_of_known_pairs_are_not_read(select: Downloads) -> None:
    select(FIRST, FIRST + MORE)
    spoiled = [select.run.path(r) for r in select.run.find("dedup:texts-A-*.parquet")]
    for path in spoiled:
        spoil(path)
    new = pictures(*range(40, 50), snapshot="B")
    assert select(FIRST + new, FIRST + MORE + new) == asked(new)
    assert select.stats.counts["pairs_known"] == len(FIRST)
    assert spoiled == [select.run.path(r) for r in select.run.find("dedup:texts-A-*.parquet")]
    with pytest.raises(pa.ArrowInvalid):
        select(FIRST + MORE + new)


def test_a_pair_that_an_earlier_snapshot_has_too_takes_its_record_from_there(
    select: Downloads,
) -> None:
    """`select` compares every record with that of the snapshot that the pair is of."""
    late = pictures(*range(10), snapshot="B")
    assert select(late) == asked(late)
    early = pictures(*range(10), snapshot="A")
    assert select(early, early + late) == []
    assert select.stats.counts["pairs_known"] == 10


@pytest.mark.parametrize("names", [("A", "A-1"), ("A-1", "A")])
def test_a_snapshot_may_be_called_like_the_beginning_of_another(
    select: Downloads, names: tuple[str, str]
) -> None:
    own = pictures(*range(10), snapshot=names[0])
    other = pictures(*range(10), snapshot=names[1])
    assert select(own, own + other) == asked(own)


def test_what_a_stopped_download_published_is_taken_over(
    select: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that were done when another failed count, though their stage never was complete."""
    honest: Callable[..., Stats] = shard.fetch_shard

    def fails_at_last(attempt: Any) -> Stats:
        if attempt.task.params["part"] == attempt.task.params["parts"] - 1:
            raise OSError("no more")
        return honest(attempt)

    monkeypatch.setattr(shard, "fetch_shard", fails_at_last)
    with pytest.raises(OSError, match="no more"):
        select(FIRST + MORE)
    partly = select._web.hits.copy()
    assert 0 < len(partly) < len(FIRST + MORE)
    monkeypatch.setattr(shard, "fetch_shard", honest)
    rest = select(FIRST + MORE, pairs_per_task=6)
    assert sorted(partly + rest) == asked(FIRST + MORE)
    select.check_pictures()


def test_manifests_of_other_tasks_of_the_plan_are_not_read(
    select: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else tasks would read as many as there are tasks squared."""
    read: list[Path] = []
    own = manifest._whole

    def note(stage_folder: Path, path: Path) -> Any:
        read.append(path)
        return own(stage_folder, path)

    select(FIRST, FIRST + MORE, pairs_per_task=17)
    before = {path.name for path in (select.folder / "download/done").iterdir()}
    monkeypatch.setattr(shard, "Earlier", lambda *given: _noting(*given, patch=(note, read)))
    assert select(FIRST + MORE, pairs_per_task=4) == asked(MORE)
    assert {path.name for path in read} == before


def _noting(*given: Any, patch: tuple[Any, list[Path]]) -> Earlier:
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(manifest, "_whole", patch[0])
        return Earlier(*given)


def test_a_snapshot_that_is_made_again_gives_its_new_records(grown: Downloads) -> None:
    """Else the dataset would tell what its run once was."""
    pairs = FIRST + MORE
    stages = [dedup_of(pairs, "moved.example"), balance_of(pairs), download.STAGE]
    grown._web.hits.clear()
    grown._inline.advance(grown.run, stages)
    assert not grown._web.hits
    grown.run = Run(grown.folder, grown.run.config)
    assert {row["page_url"] for row in grown.rows()} == {"http://moved.example/A"}


def test_an_unfinished_larger_selection_is_not_lost_by_going_back(grown: Downloads) -> None:
    larger = FIRST + MORE + pictures(*range(30, 50))
    grown._web.hits.clear()
    stages = [dedup_of(larger), balance_of(larger), download.STAGE]
    count = len(grown._inline.ran)
    with pytest.raises(KeyboardInterrupt):
        grown._inline.advance(grown.run, stages, stop_after=2)
    assert len(grown._inline.ran) > count
    fetched = set(grown._web.hits)
    assert fetched
    assert grown(FIRST + MORE, larger) == []
    assert not fetched & set(grown(larger))


def test_a_list_that_changes_asks_again_only_what_it_must(
    select: Downloads, tmp_path: Path
) -> None:
    path = tmp_path / "blocked.txt"
    lists = ListsSettings(blocked=ListSettings(domains=(str(path),)))
    pairs = [Pair(f"http://{host}.example/picture/{i}") for i, host in enumerate("abcc")]
    away = "/redirect?to=http://d.example/ok.jpg"
    pairs.append(Pair(f"http://e.example{away}"))

    def go(listed: str) -> tuple[list[str], str]:
        path.write_text(listed)
        hits = select(pairs, lists=lists)
        blocked = {row["url"][7] for row in select.rows() if row["status"] == "blocked"}
        return hits, "".join(sorted(blocked))

    everything = ["/ok.jpg", "/picture/0", "/picture/1", "/picture/2", "/picture/3", away]
    assert go("a.example\n") == ([hit for hit in everything if hit != "/picture/0"], "a")
    assert go("b.example\n") == (["/picture/0"], "b")
    assert go("b.example\nd.example\n") == ([away], "be")
    assert go("# the same\nb.example\nd.example\n") == ([], "be")
    assert go("# none\n") == (["/ok.jpg", "/picture/1", away], "")
