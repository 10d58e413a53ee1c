"""Processes: found from the environment, and equal to one process when there are several."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from pipeline.config import ConfigError
from pipeline.stage import Attempt
from tests.train.conftest import TINY_MODEL, Pack
from train import loop
from train.distributed import _port, _rendezvous, connected, first_host

VIT = {**TINY_MODEL, "tower": "vit", "layers": [1], "width": 16, "head_width": 16}


def test_where_processes_meet() -> None:
    assert _rendezvous({"MASTER_ADDR": "x", "MASTER_PORT": "1"}) == "env://"
    slurm = {"SLURM_STEP_NODELIST": "localhost,b[1-2]", "SLURM_JOB_ID": "41234"}
    assert _rendezvous(slurm | {"SLURM_JOB_NODELIST": "a"}) == "tcp://localhost:11234"
    assert _rendezvous({"SLURM_JOB_NODELIST": "localhost"}) == "tcp://localhost:10000"
    assert _rendezvous(slurm | {"MASTER_ADDR": "10.0.0.1"}) == "tcp://10.0.0.1:11234"
    with pytest.raises(ConfigError, match="torchrun or srun"):
        _rendezvous({"SLURM_JOB_ID": "41234"})
    with pytest.raises(
        ConfigError, match=r"no-such-node1\.invalid, the first node of .*MASTER_ADDR"
    ):
        _rendezvous({"SLURM_STEP_NODELIST": "no-such-node[1-2].invalid"})


def test_the_port_is_the_attempts_own_and_no_ephemeral_one() -> None:
    first_ephemeral = 32_768  # of Linux, unless it is told otherwise
    attempts = [(str(job), str(restart)) for job in range(1, 3000) for restart in range(3)]
    ports = [_port({"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": re}) for job, re in attempts]
    assert min(ports) >= 10_000
    assert max(ports) < first_ephemeral
    assert len(set(ports)) == len(ports)
    assert _port({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}) != _port({"SLURM_JOB_ID": "7"})


NODES = {
    "a1": "a1",
    "a1,b2": "a1",
    "gpu[003-007,9],cpu1": "gpu003",
    "n[4,7]": "n4",
    "a[01-03,7]b[1-2],c": "a01b1",
    "rack-1.cluster[2]-ib,x": "rack-1.cluster2-ib",
    "[10-12]": "10",
}
"""SLURM's notation -> its first host."""


@pytest.mark.parametrize("nodes", NODES)
def test_the_first_host_of_a_list(nodes: str) -> None:
    assert first_host(nodes) == NODES[nodes]


@pytest.mark.parametrize("nodes", ["", ",a", "a[", "a[1", "a]1", "a[]", "a[1-2]]", "a b"])
def test_a_list_that_cannot_be_read_is_an_error(nodes: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        first_host(nodes)


def test_alone_nothing_is_reduced() -> None:
    with connected({}) as process:
        assert process.leads
        assert process.any(True, False) == (True, False)
        assert process.sum(1.5, torch.tensor(3.0), True, torch.tensor(0.5)) == (1.5, 3, 1, 0.5)
        assert not dist.is_initialized()


def test_two_processes_train_the_model_of_one(
    pack: Pack, attempt: Callable[..., Attempt], tmp_path: Path
) -> None:
    packed = pack(24)
    alone = attempt(packed, run="alone", model=VIT, samples=64)
    loop.train(alone)
    attempts = [attempt(packed, run="pair", model=VIT, samples=64) for _ in range(2)]
    (tmp_path / "attempts").write_bytes(pickle.dumps(attempts))
    mp.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    # Under torchrun each process has an attempt of its own, and any may be the one that publishes.
    for path in attempts[0].folder.iterdir():
        assert (attempts[1].folder / path.name).read_bytes() == path.read_bytes()
    expected = load_file(alone.folder / "model.safetensors")
    actual = load_file(attempts[0].folder / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-2, atol=2e-4)


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    attempts = pickle.loads((Path(folder) / "attempts").read_bytes())
    loop.train(attempts[rank])
    dist.destroy_process_group()
