"""What all tests share: where real inputs are, if anywhere, and a SLURM cluster where installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import local_slurm
from tests.cluster.local_slurm import Cluster

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real inputs that $OPENWIT_DATA names; skips where it is unset."""
    folder = os.environ.get("OPENWIT_DATA")
    if not folder:
        pytest.skip("$OPENWIT_DATA is not set: it names a folder with real inputs")
    return Path(folder)


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    """The SLURM that all tests of a session share; skips where SLURM is not installed."""
    if reason := local_slurm.missing():
        pytest.skip(reason)
    with local_slurm.start() as cluster:
        yield cluster


@pytest.fixture
def cluster(
    running_cluster: Cluster, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    """Four idle nodes that SLURM's commands of this test speak to; no job outlives the test."""
    assert request.node.get_closest_marker("slurm"), "mark tests that start a cluster with `slurm`"
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(running_cluster.conf))
    yield running_cluster
    running_cluster.clear()
