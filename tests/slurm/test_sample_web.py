"""The sample web, built and watched on a cluster: the same bytes as on one machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.manifest import Manifest
from tests.cluster.local_slurm import Cluster

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/sample.yaml"
TINY = [
    "sample_web.pairs=150",
    "sample_web.articles=60",
    "sample_web.hours=1",
    "sample_web.evaluation_per_class=1",
    "sample_web.unseen_per_class=1",
    "balance.cap=12",
    "download.pairs_per_task=150",
    "pack.pairs_per_shard=60",
]


def published(run: Path) -> dict[str, str]:
    """SHA-256 of every output that all manifests of a run name."""
    manifests = [Manifest.from_json(path.read_text()) for path in run.glob("*/done/*.json")]
    return {f"{m.stage}/{o.name}": o.sha256 for m in manifests for o in m.outputs}


def staged(path: Path) -> object:
    """What `download` says of addresses but for when it was: pictures of a tar, or outcomes."""
    if path.suffix == ".parquet":
        return pq.read_table(path).drop_columns(["fetched", "staged_offset"]).to_pylist()
    with tarfile.open(path) as tar:
        files = [(member.name, tar.extractfile(member)) for member in tar]
        return sorted((name, file.read()) for name, file in files if file and "jpg" in name)


def build(run: Path, *more: str) -> None:
    command = [sys.executable, "-m", "pipeline", "build", str(CONFIG), "--run", str(run), *more]
    done = subprocess.run([*command, *TINY], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.timeout(600)
def test_arrays_build_the_same_dataset_as_one_machine(cluster: Cluster, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    build(here)
    jobs = ["slurm.poll_seconds=0.5", "slurm.tasks_per_job=3", "slurm.default.cpus=2"]
    build(there, "--on", "slurm", "--wait", *jobs)
    expected, found = published(here), published(there)
    assert any(name.endswith(".tar") for name in found) and len(found) > 30
    differing = {name for name in expected | found if expected.get(name) != found.get(name)}
    # Staged pictures are in the order in which they arrived; pack puts them in theirs.
    for name in [name for name in differing if name.startswith("download/")]:
        out = name.replace("/", "/out/")
        assert staged(here / out) == staged(there / out) != []
        differing.remove(name)
    assert not differing
    made_by = {m["job"] for m in map(_json, there.glob("*/done/*.json"))}
    assert "" not in made_by and len(made_by) > 10
    assert not (there / "sample_web/logs/canary.txt").exists()


def _json(path: Path) -> dict[str, str]:
    values: dict[str, str] = json.loads(path.read_text())
    return values
