"""Screening anew after pictures were removed: it says of all others what it said before."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from dataset_build import purge, removal
from dataset_build.lists import Lists, ListsSettings
from dataset_build.screen import ScreenSettings
from dataset_build.screen.judge import Judge
from dataset_build.screen.verdicts import Verdicts
from pipeline import damage, manifest
from pipeline.stage import Run
from pipeline.stats import Stats
from tests.dataset_build import published_build
from tests.dataset_build.published_build import Web, run_in
from tests.dataset_build.screen.pool import jpeg
from tests.dataset_build.screen.pool import picture as patches

WEB = Web(size=60)
FIRST, *_ = sorted(range(WEB.size), key=WEB.uid)
BLOCKED = [number for number in (10, 25, 40, 55) if number != FIRST]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with a list of pictures, of which the first picture of all was removed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published_build, "picture", lambda number: jpeg(patches(number, 64, 64)))
        folder = tmp_path_factory.mktemp("built")
        (folder / "list.txt").write_text("")
        WEB.build(configured(folder / "run", folder))
        hashes = looked(folder / "run")
        (folder / "list.txt").write_text("\n".join(hashes[WEB.uid(n)].hex() for n in BLOCKED))
        WEB.build(configured(folder / "run", folder))
        yield folder


def looked(run: Path) -> dict[bytes, bytes]:
    tables = [pq.read_table(path) for path in (run / "screen/out").glob("looked-*")]
    return {row["uid"]: row["pdq"] for table in tables for row in table.to_pylist()}


def configured(run: Path, folder: Path, **options: Any) -> Run:
    described = run_in(run)
    lists = {"blocked": {"perceptual": (str(folder / "list.txt"),)}}
    options = {"drop_placeholders": False, "near_distance": None, **options}
    update = {
        "screen": ScreenSettings.model_validate(options),
        "lists": ListsSettings.model_validate(lists),
    }
    return Run(run, described.config.model_copy(update=update))


def verdicts_of_others(run: Path) -> dict[bytes, str]:
    """Reasons by uid. Of the removed one it depends on whether they were reached anew."""
    tables = [pq.read_table(path) for path in (run / "screen/out").glob("screened-*")]
    found = {row["uid"]: row["reason"] for table in tables for row in table.to_pylist()}
    assert found.pop(WEB.uid(FIRST)) in ("", "removed")
    return found


@pytest.fixture
def purged(built: Path, tmp_path: Path) -> Path:
    """A copy of the run that has lost its first picture."""
    subprocess.run(["cp", "-a", built, tmp_path / "built"], check=True)
    folder = tmp_path / "built"
    (folder / "list.txt").write_bytes((built / "list.txt").read_bytes())
    (tmp_path / "asked.txt").write_text(WEB.url(FIRST))
    run = configured(folder / "run", built)
    removal.ask(run, removal.read([tmp_path / "asked.txt"]))
    WEB.build(run)
    return folder / "run"


CHANGES: list[dict[str, Any]] = [
    {"captions_per_picture": 5},
    {"pairs_per_picture": 2},
    {"near_distance": 20},
    {"near_distance": 31},
    {"listed_distance": 1},
    {"drop_placeholders": True},
    {"scores": {"sharp": {"function": "dataset_build.screen.measures:sharpness"}}},
    {"scores": {"sharp": {"function": "dataset_build.screen.measures:sharpness", "at_least": 0}}},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_another_setting_says_the_same_of_what_is_left(
    purged: Path, built: Path, change: dict[str, Any]
) -> None:
    before = verdicts_of_others(built / "run")
    assert [before[WEB.uid(n)] for n in BLOCKED] == ["blocked"] * len(BLOCKED)
    assert list(before.values()).count("blocked") == len(BLOCKED)
    for _ in range(2):  # the second time as a build of its own
        run = configured(purged, built, **change)
        WEB.build(run)
    assert verdicts_of_others(purged) == before
    stats = Run(run.folder, run.config).manifests("screen")[-1].stats
    assert (stats.rows_in, stats.balanced()) == (WEB.size, True)
    assert sum(stats.histograms["list:blocked"].values()) == len(BLOCKED)
    if "scores" in change:
        assert sum(stats.histograms["score:sharp"].values()) == WEB.size - 1


@pytest.mark.parametrize("near", [None, 31])
@pytest.mark.parametrize(
    "name", ["looked-*", "hashes.npy", "classes.npy", "hits-*", "screened-*", "survivors.json"]
)
def test_what_is_damaged_is_made_again(
    purged: Path, built: Path, name: str, near: int | None
) -> None:
    options = {} if near is None else {"near_distance": near}
    WEB.build(configured(purged, built, **options))
    path = next((purged / "screen/out").glob(name))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    run = configured(purged, built, **options)
    discarded = 0
    for done in run.manifests("screen"):
        if damage.damage(run.stage_folder("screen"), done):
            manifest.discard(run.stage_folder("screen"), done)
            discarded += 1
    assert discarded
    executor = WEB.build(configured(purged, built, **options))
    assert {task.stage for task in executor.ran} >= {"screen"}
    assert verdicts_of_others(purged) == verdicts_of_others(built / "run")
    assert purge.is_settled(purged)


def test_what_was_looked_at_must_be_what_is_judged(purged: Path) -> None:
    """Of another version, say, that numbered only what is left."""
    (path, *_) = sorted((purged / "screen/out").glob("looked-*"))
    name = path.name.removeprefix("looked-")
    fetched = pq.read_table(purged / "download/out" / f"fetched-{name}")
    judge = Judge(ScreenSettings(), Lists([]), [path], [], [], Stats())
    judge.judge(name, fetched, slice(0, len(fetched)), Verdicts(len(fetched), ()))
    left = fetched.filter(pc.equal(fetched["status"], "ok"))
    with pytest.raises(manifest.Damaged, match="pictures, not the"):
        judge.judge(name, left, slice(0, len(left)), Verdicts(len(left), ()))
