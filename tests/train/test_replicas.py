"""Replicas: a flipped bit is found, its process named, and the run ends as if it had not been."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pipeline.stage import Attempt
from tests.train.conftest import Pack
from tests.train.recipe import SETTINGS
from train import loop
from train.data.loader import Batch
from train.replicas import ReplicasDiffer, checksums, odd_ranks
from train.step import TrainStep

Make = Callable[..., Attempt]


def test_any_single_bit_changes_the_checksum() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        weights = [torch.randn(3, 4).to(dtype), torch.randn(()).to(dtype)]
        whole = checksums(weights)
        integer = torch.int32 if dtype is torch.float32 else torch.int16
        width = torch.iinfo(integer).bits
        for bit in range(width):
            weights[0].view(integer)[1, 2] ^= 1 << bit if bit < width - 1 else -1 << bit
            assert checksums(weights)[0] != whole[0]
            assert checksums(weights)[1] == whole[1]
            weights[0].view(integer)[1, 2] ^= 1 << bit if bit < width - 1 else -1 << bit
        assert torch.equal(checksums(weights), whole)


@pytest.mark.parametrize(
    ("digests", "odd"),
    [
        ([7], []),
        ([7, 7, 7], []),
        ([7, 8, 7], [1]),
        ([8, 7, 7, 9, 7], [0, 3]),
        ([7, 8], [0, 1]),  # no majority: nobody is singled out
        ([7, 7, 8, 8], [0, 1, 2, 3]),
    ],
)
def test_the_majority_is_right(digests: list[int], odd: list[int]) -> None:
    assert odd_ranks(digests) == odd


@pytest.mark.slow
@pytest.mark.timeout(600)  # seconds on an idle machine; each rank loads torch anew
@pytest.mark.parametrize("world", [2, 3])
def test_a_flipped_bit_is_found_and_leaves_no_trace(
    world: int, pack: Pack, attempt: Make, tmp_path: Path
) -> None:
    packed = pack(24)
    data = {"lanes": world, "block_samples": 5, "margin": 2}
    settings = SETTINGS | {"samples": 12 * 30, "batch": 12, "data": data}
    more = {"check_replicas_every": 7, "clip_gradients": True}
    runs = [
        [attempt(packed, run=run, **settings, **more) for _ in range(world)]
        for run in ("undisturbed", "run", "run")
    ]
    (tmp_path / "attempts").write_bytes(pickle.dumps(runs))
    mp.spawn(_rank, (world, str(tmp_path)), nprocs=world)
    whole, again = tmp_path / "attempt-1", tmp_path / f"attempt-{2 * world + 1}"
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    incidents = (tmp_path / "run" / "train" / "incidents.jsonl").read_text().splitlines()
    assert '"what": "replicas"' in incidents[-1]


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    whole, disturbed, again = pickle.loads((Path(folder) / "attempts").read_bytes())
    loop.train(whole[rank])

    real = TrainStep.gradients

    def flipping(this: TrainStep, step: int, batch: Batch) -> Tensor:
        if step == 17 and rank == 1:
            weight = this.net.text.text_projection  # type: ignore[union-attr]
            weight.data.view(torch.int32)[3, 5] ^= 1 << 12
        return real(this, step, batch)

    TrainStep.gradients = flipping  # type: ignore[method-assign]
    who = "rank 1 differ from the others" if world > 2 else "ranks 0, 1 differ from each other"
    # Found before the checkpoint of step 20 is written, which no process then has to distrust.
    with pytest.raises(ReplicasDiffer, match=rf"step 19: the weights of {who}.*text_projection"):
        loop.train(disturbed[rank])
    TrainStep.gradients = real  # type: ignore[method-assign]
    loop.train(again[rank])
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(600)  # seconds on an idle machine; each rank loads torch anew
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(
    pack: Pack, attempt: Make, tmp_path: Path
) -> None:
    packed = pack(24)
    settings = SETTINGS | {"samples": 8 * 16, "check_replicas_every": 1}
    attempts = [attempt(packed, **settings) for _ in range(2)]
    (tmp_path / "attempts").write_bytes(pickle.dumps(attempts))
    mp.spawn(_poisoned_rank, (str(tmp_path),), nprocs=2)


def _poisoned_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    attempts = pickle.loads((Path(folder) / "attempts").read_bytes())
    real = TrainStep.gradients

    def poisoned(this: TrainStep, step: int, batch: Batch) -> Tensor:
        figures = real(this, step, batch)
        if rank == 1 and step in (4, 9):
            figures[0] *= float("nan")
        return figures

    TrainStep.gradients = poisoned  # type: ignore[method-assign]
    stats = loop.train(attempts[rank])  # replicas are compared after every step
    assert stats.dropped == {"step_not_finite": 16}
    dist.destroy_process_group()
