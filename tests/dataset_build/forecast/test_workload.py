"""A build that is planned from a finished one: tasks and rows must be those of the real thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_build.forecast import pilot
from dataset_build.forecast.sizes import Asked
from dataset_build.forecast.workload import Workload
from pipeline import plan, rates, recipe
from pipeline.config import ConfigError, load
from pipeline.plan import Cost, Ledger
from pipeline.rates import Rates
from pipeline.stage import Run
from tests.dataset_build.inline import InlineExecutor
from tests.test_end_to_end import CONFIG, TINY

STAGES = pilot.STAGES


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished build of the sample web with a cap that bites."""
    run = Run(tmp_path_factory.mktemp("built") / "run", load(recipe.Config, CONFIG, TINY))
    InlineExecutor().advance(run, recipe.build_stages(run.config))  # type: ignore[arg-type]
    return Run(run.folder, run.config)


def known(*runs: Run) -> Ledger:
    shipped = rates.shipped()
    measured = Rates()
    for run in runs:
        measured.figures |= pilot.figures(run, "pilot")
    seen = [task for run in runs for task in pilot.observations(run)]
    measured.kinds = rates.fit(seen, shipped.kinds, "pilot")
    return Ledger(measured.over(shipped))


def costs(run: Run, ledger: Ledger, pilots: list[Run], **asked: Any) -> dict[str, Cost]:
    build = Workload(run, Asked(**asked), ledger, pilots)
    return {work.stage: plan.cost(work, ledger, 2) for work in build.stages()}


def other(run: Run, **sections: dict[str, Any]) -> Run:
    """The same run with other settings."""
    values = run.config.model_dump(mode="json")
    for name, fields in sections.items():
        values[name] |= fields
    return Run(run.folder, recipe.Config.model_validate(values))


def test_a_run_planned_from_itself_is_itself(built: Run) -> None:
    planned = costs(built, known(built), [built])
    for stage in STAGES:
        done = built.manifests(stage)
        stats = pilot.total(done)
        cost = planned[stage]
        assert cost.tasks == len(done), stage
        busy = sum(one.seconds for one in done)
        assert cost.busy_s == pytest.approx(busy, rel=0.02, abs=0.05), stage
        size = sum(output.bytes for one in done for output in one.outputs)
        assert cost.kept_bytes == pytest.approx(size, rel=0.05), stage
        files = sum(len(one.outputs) + 2 for one in done)
        assert cost.files == pytest.approx(files), stage
        if stage != "queries":
            assert cost.rows_out == pytest.approx(stats.rows_out, rel=0.02), stage


def test_the_cap_leaves_what_it_left(built: Run) -> None:
    """Expected over the seeds; this seed's share may be some hundredths off."""
    cap = pilot.under_cap(built, 1.0, built.settings("balance"), files=1)
    stats = pilot.total(built.manifests("balance"))
    assert cap
    assert stats.counts["capped_queries"] > 10
    assert cap.share == pytest.approx(stats.rows_out / stats.rows_in, abs=0.03)
    assert cap.share < 0.99
    assert cap.entries == pytest.approx(stats.counts["sketch_entries"], rel=0.1)


def test_a_larger_build_keeps_a_smaller_share(built: Run) -> None:
    """With a hundred times the pairs every query is over the cap, and selects `cap` of them."""
    settings = built.settings("balance")
    shares = [pilot.under_cap(built, growth, settings, 1) for growth in (1.0, 3.0, 100.0)]
    assert all(shares)
    values = [cap.share for cap in shares if cap]
    assert values[0] > values[1] > values[2]
    grown = pilot.under_cap(built, 1e6, settings, 1)
    counts = np.sum([np.load(path) for path in _counts(built)], axis=0)
    pairs = pilot.total(built.manifests("dedup")).rows_out * 1e6
    assert grown
    assert grown.share * pairs == pytest.approx((counts > 0).sum() * settings.limit.pairs, rel=0.01)


def _counts(run: Run) -> list[Path]:
    return [run.path(reference) for reference in run.find("dedup:count-*.npy")]


def test_tasks_follow_the_settings_that_cut_them(built: Run) -> None:
    run = other(
        built,
        match={"buckets": 256},
        dedup={"buckets_per_task": 32},
        download={"pairs_per_task": 100},
        pack={"pairs_per_shard": 50},
    )
    planned = costs(run, known(built), [built], candidates=1e6, snapshots=3, files=7)
    selected, pairs = planned["balance"].rows_out, planned["pack"].rows_out
    assert planned["extract"].tasks == 7
    assert planned["match"].tasks == 1 + 7
    assert planned["dedup"].tasks == 8 * 3 + 8
    assert planned["balance"].tasks == 3 + 8 + 8
    assert planned["download"].tasks == -(-selected // 100)
    assert planned["pack"].tasks == -(-pairs // 50) + 1


def test_files_that_are_elsewhere_are_taken_to_be_as_large_as_most(built: Run) -> None:
    """Nobody is asked: no such host is there."""
    addresses = [f"https://none.example/{number}.warc.wat.gz" for number in range(7)]
    run = other(built, extract={"wat": addresses, "warc": (), "pool": ()})
    ledger = known(built)
    planned = costs(run, ledger, [])
    assert planned["extract"].tasks == 7
    size = 7 * ledger.figure("extract.wat.file_bytes")
    rows = size * ledger.figure("extract.wat.rows_per_byte")
    assert planned["extract"].rows_out == pytest.approx(rows)


def test_files_of_many_candidates_are_several_tasks_of_match(built: Run) -> None:
    run = other(built, match={"rows_per_task": 1000})
    planned = costs(run, known(built), [built], candidates=10_000, files=3)
    assert planned["match"].tasks == 1 + 3 * 4  # 3,333 rows a file


def test_the_size_that_is_asked_for_is_reached(built: Run) -> None:
    planned = costs(built, known(built), [built], candidates=1e8, pairs=1e6)
    assert planned["pack"].rows_out == pytest.approx(1e6)
    assert planned["extract"].rows_out == 1e8
    ledger = known(built)
    share = ledger.figure("download.share") * ledger.figure("screen.share")
    assert planned["balance"].rows_out == pytest.approx(1e6 / share)


def test_a_given_share_is_taken_and_named(built: Run) -> None:
    ledger = known(built)
    planned = costs(built, ledger, [built], candidates=1e6, ratios={"balance": 0.5, "match": 0.1})
    assert planned["match"].rows_out == pytest.approx(1e5)
    assert planned["balance"].rows_out == pytest.approx(planned["dedup"].rows_out / 2)
    assert ledger.used["balance.share"].source == "given"


def test_more_pairs_than_there_are_candidates_is_said(built: Run) -> None:
    with pytest.raises(ConfigError, match=r"selected pairs are asked for, but 1,000 candidates"):
        costs(built, known(built), [built], candidates=1000, pairs=1e6)


def test_inputs_that_are_not_there_are_asked_for(built: Run, tmp_path: Path) -> None:
    away = Run(tmp_path / "new", built.config)
    with pytest.raises(ConfigError, match=r"--candidates 12e9.*--pairs 400e6"):
        costs(away, known(built), [built])


def test_without_a_pilot_the_references_are_named(built: Run, tmp_path: Path) -> None:
    config = {"extract": {"wat": ["/crawl/*.wat.gz"]}}
    away = Run(tmp_path / "new", recipe.Config.model_validate(config))
    ledger = Ledger(rates.shipped())
    planned = costs(away, ledger, [], pairs=400e6)
    assert planned["pack"].rows_out == pytest.approx(400e6)
    for name in ("match.share", "balance.share", "download.share", "picture_bytes"):
        assert ledger.used[name].source.startswith("reference"), name
    assert any("match.buckets" in note for note in ledger.notes)


def test_pictures_of_another_size_take_other_room(built: Run) -> None:
    side = built.settings("download").image_size
    plain = costs(built, known(built), [built])["download"]
    large = costs(other(built, download={"image_size": 2 * side}), known(built), [built])
    picture = pilot.picture_bytes(built)
    more = large["download"].kept_bytes - plain.kept_bytes
    assert more == pytest.approx(3 * picture * plain.rows_out, rel=0.01)


def test_the_download_waits_for_the_addresses_it_may_ask_for(built: Run) -> None:
    ledger = known(built)
    planned = costs(built, ledger, [built], candidates=1e6, addresses_per_s=10)
    assert planned["download"].wall_s == pytest.approx(planned["balance"].rows_out / 10)


def test_the_first_stages_alone_can_be_planned(built: Run) -> None:
    config = built.config.model_copy(update={"until": "dedup"})
    assert list(costs(Run(built.folder, config), known(built), [built])) == list(STAGES[:4])
