"""Processes: found from the environment, and equal to one process when there are several."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from pipeline.stage import Attempt
from tests.train.conftest import TINY_MODEL, Pack
from train import loop
from train.distributed import _first_host, _rendezvous, connected

VIT = {**TINY_MODEL, "tower": "vit", "layers": [1], "width": 16, "head_width": 16}


def test_where_processes_meet() -> None:
    assert _rendezvous({"MASTER_ADDR": "x", "MASTER_PORT": "1"}) == "env://"
    slurm = {"SLURM_STEP_NODELIST": "gpu[003-007,9],cpu1", "SLURM_JOB_ID": "41234"}
    assert _rendezvous(slurm) == "tcp://gpu003:21234"
    assert [_first_host(nodes) for nodes in ("a1", "a1,b2", "n[4,7]", "")] == [
        "a1",
        "a1",
        "n4",
        "127.0.0.1",
    ]


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
