"""The whole way on a tiny sample web: built, trained, evaluated, killed, repeated, changed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests import kill_nine

pytestmark = pytest.mark.timeout(600)  # the first builds, trains and evaluates

CONFIG = kill_nine.ROOT / "configs" / "sample.yaml"
TINY = [
    "sample_web.pairs=300",
    "sample_web.articles=110",
    "sample_web.hours=1",
    "sample_web.evaluation_per_class=1",
    "sample_web.unseen_per_class=1",
    "balance.cap=12",
    "download.pairs_per_task=250",
    "pack.pairs_per_shard=100",
    "train.samples=320",
    "train.batch=32",
    "train.data.lanes=8",
    "train.data.block_samples=8",
    "train.model.layers=[1,1,1,1]",
    "train.model.width=8",
    "train.model.text_layers=1",
    "train.checkpoint.max_lost_steps=6",
    "train.threads=1",
    "evaluate.threads=1",
]


def pipeline(what: str, run: Path, *overrides: str) -> str:
    """Run one command to its end; what it said."""
    command = kill_nine.command(what, CONFIG, run, [*TINY, *overrides])
    done = subprocess.run(
        command, cwd=kill_nine.ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was built, trained and evaluated without disturbance."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pipeline("build", folder)
    pipeline("evaluate", folder)
    return folder


def test_every_stage_accounts_for_what_the_one_before_gave(run: Path) -> None:
    report = json.loads((run / "report" / "report.json").read_text())
    funnel = {row["name"]: row for row in report["funnel"]}
    names = ["extract", "match", "dedup", "balance", "download", "screen", "pack"]
    for before, after in pairwise(names):
        assert funnel[before]["rows_out"] == funnel[after]["rows_in"], (before, after)
    assert all(funnel[name]["rows_out"] > 0 for name in names)


def test_the_cap_is_exact_and_bites(run: Path) -> None:
    coverage = pq.read_table(run / "balance/out/coverage.parquet").to_pydict()
    expected = np.minimum(coverage["count"], 12)
    assert coverage["selected"] == expected.tolist()
    assert sum(count > 12 for count in coverage["count"]) > 10
    assert (np.load(run / "balance/out/counts.npy") == coverage["count"]).all()


def test_nothing_forbidden_was_fetched_and_every_fault_has_its_reason(run: Path) -> None:
    assert not (run / "sample_web/logs/canary.txt").exists()
    reasons = {
        status
        for path in (run / "download/out").glob("fetched-*.parquet")
        for status in pq.read_table(path, columns=["status"])["status"].to_pylist()
    }
    planted = {"dead_link", "forbidden", "blocked_address", "opt_out", "timeout", "truncated"}
    planted |= {"robots"}
    assert planted <= reasons


READ_WITH_WEBDATASET = """
import hashlib, sys, webdataset
for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False, empty_check=False):
    print(sample["__key__"], hashlib.sha256(sample["jpg"]).hexdigest(), len(sample["txt"]) > 0)
"""


def test_webdataset_reads_the_shards(run: Path) -> None:
    index = pq.read_table(run / "pack/out/index.parquet")
    shards = sorted(str(path) for path in (run / "pack/out/shards").glob("*.tar"))
    command = [sys.executable, "-c", READ_WITH_WEBDATASET, *shards]
    read = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    columns = zip(index["uid"].to_pylist(), index["sha256"].to_pylist(), strict=True)
    assert read == [f"{uid.hex()} {sha256.hex()} True" for uid, sha256 in columns]


def test_evaluation_judges_among_all_classes(run: Path) -> None:
    found = json.loads((run / "evaluate/evaluation.json").read_text())
    assert set(found) == {"sample_web", "sample_web_unseen"}
    assert all(result["classes"] == 100 for result in found.values())


def test_nothing_changed_runs_nothing_and_says_so(run: Path) -> None:
    before = kill_nine.digests(run)
    assert "nothing to run" in pipeline("build", run)
    assert "nothing to run" in pipeline("evaluate", run)
    assert kill_nine.digests(run) == before


def test_the_learning_rate_touches_no_dataset_stage(run: Path) -> None:
    assert "dataset: everything is up to date, nothing to run" in pipeline(
        "build", run, "train.lr=5e-4"
    )


def test_a_changed_cap_runs_again_from_balance_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    pipeline("build", run, "until=dedup")
    said = pipeline("build", run, "until=balance", "balance.cap=9")
    for stage in ("sample_web", "queries", "extract", "match", "dedup"):
        assert f"{stage}: up to date" in said
    said = pipeline("build", run, "until=balance", "balance.cap=8")
    assert "dedup: up to date" in said and "balance: up to date" not in said


def test_a_model_of_an_earlier_dataset_is_not_shown_as_that_of_the_new_one(
    run: Path, tmp_path: Path
) -> None:
    again = tmp_path / "run"
    shutil.copytree(run, again)
    for cap, state in ((9, "waiting"), (12, "done")):
        pipeline("build", again, f"balance.cap={cap}")
        ask = [sys.executable, "-m", "pipeline", "status", str(again)]
        said = subprocess.run(ask, cwd=kill_nine.ROOT, capture_output=True, text=True, check=True)
        assert re.search(rf"^train +{state}", said.stdout, re.MULTILINE), said.stdout
        report = json.loads((again / "report/report.json").read_text())
        assert bool(report["training"]) is bool(report["evaluation"]) is (state == "done")


def test_killed_runs_end_with_the_same_bytes(run: Path, tmp_path: Path) -> None:
    expected = kill_nine.digests(run)
    assert any(name.endswith(".tar") for name in expected) and len(expected) >= 6
    again = tmp_path / "run"
    for what, within_s, kills in (("build", 12.0, 2), ("train", 8.0, 2)):
        kill_nine.disturbed(what, CONFIG, again, TINY, kills=kills, within_s=within_s, seed=5)
    assert kill_nine.digests(again) == expected


@pytest.mark.parametrize("workers", [1, 8])
def test_shards_do_not_depend_on_how_many_pack_them(
    run: Path, tmp_path: Path, workers: int
) -> None:
    again = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(again / "pack")
    said = pipeline("build", again, f"local.workers={workers}")
    assert "screen: up to date" in said and "pack: up to date" not in said
    assert kill_nine.digests(again) == kill_nine.digests(run)


def verified(folder: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "pipeline", "verify", str(folder)]
    done = subprocess.run(
        command, cwd=kill_nine.ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    return done.returncode, done.stdout


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


def test_verify_finds_damage_and_build_repairs_it(run: Path, tmp_path: Path) -> None:
    assert verified(run)[0] == 0
    out = run / "pack/out"
    copy = Path(shutil.copytree(out, tmp_path / "copy"))  # the dataset alone
    assert verified(copy) == (0, "all files are as they were packed\n")
    before = kill_nine.digests(run)
    rows = pq.read_table(out / "index.parquet").to_pylist()
    sample = [row for row in rows if row["shard"] == "00001.tar"][7]
    for folder in (out, copy):
        flip(folder / "shards/00001.tar", sample["text_offset"])
        flip(folder / "index.parquet", 4 * len(rows))
    found, said = verified(run)
    assert found == 5
    assert f"{out}/shards/00001.tar: its bytes differ from those published" in said
    assert f"{out}/index.parquet: its bytes differ from those published" in said
    found, said = verified(copy)
    assert found == 5 and f"{copy}/index.parquet: its bytes differ" in said
    said = pipeline("build", run)
    assert "download: up to date" in said
    assert kill_nine.digests(run) == before
    assert verified(run)[0] == 0
    shutil.copy2(out / "index.parquet", copy)
    found, said = verified(copy)
    shard = copy / "shards/00001.tar"
    assert said.splitlines()[:2] == [
        f"{shard}: its bytes differ from those that were packed",
        f"{shard}: sample {sample['uid'].hex()}: its text is not the one that was packed",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "configs/sampel.yaml"], "did you mean configs/sample.yaml?"),
        (["build", "configs/sample.yaml", "balance.capp=3"], "did you mean 'cap'?"),
        (["status", "runs/never"], "runs/never: no run here"),
        (
            [
                "build",
                "configs/sample.yaml",
                "until=extract",
                "extract.pool=[/not/here.parquet]",
            ],
            "/not/here.parquet: no such input",
        ),
    ],
)
def test_mistakes_are_answered_with_what_to_do(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    extra = ["--run", str(tmp_path / "run")] if arguments[0] == "build" else []
    command = [sys.executable, "-m", "pipeline", *arguments[:2], *extra, *arguments[2:]]
    small = [part for part in TINY if part.startswith("sample_web")] if extra else []
    done = subprocess.run(
        [*command, *small], cwd=kill_nine.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode in (2, 3)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_purged_leaves_the_shards_and_the_rest_as_it_was(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-a", run, copy], check=True)
    index = pq.read_table(run / "pack/out/index.parquet")
    uids = [uid.hex() for uid in index["uid"].to_pylist()]
    (tmp_path / "list.txt").write_text(f"{uids[5]}\n{index['sha256'][50].as_py().hex()}\n")
    command = [sys.executable, "-m", "pipeline"]
    for words in (["purge", copy, tmp_path / "list.txt"], ["verify", copy]):
        done = subprocess.run(
            [*command, *map(str, words)], capture_output=True, text=True, cwd=kill_nine.ROOT
        )
        assert done.returncode == 0, done.stderr[-3000:]
    left = pq.read_table(copy / "pack/out/index.parquet")["uid"].to_pylist()
    assert [uid.hex() for uid in left] == [u for u in uids if u not in (uids[5], uids[50])]
    status = subprocess.run(
        [*command, "status", str(copy)], capture_output=True, text=True, cwd=kill_nine.ROOT
    )
    assert re.search(r"removed: \d+ pairs by 1 request", status.stdout)
    assert "nothing to run" in pipeline("build", copy)
