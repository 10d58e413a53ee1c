"""A training of a few small tensors, plain, with DDP or with FSDP2, on gloo ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from train.checkpoint import Checkpointer
from train.distributed import Process
from train.settings import CheckpointSettings

BATCH = 8
CPU = torch.device("cpu")


class Net(nn.Module):
    """Sizes that no number of ranks divides, statistics, and a parameter of one element."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu()) * self.scale


class Toy:
    """A model, its optimiser, and steps that depend on their number alone."""

    def __init__(self, kind: str, process: Process, width: int = 7) -> None:
        self.process = process
        torch.manual_seed(0)
        self.net = Net(width).to(process.device)
        self.forward: nn.Module = self.net
        if kind == "ddp":
            self.forward = DistributedDataParallel(self.net)
        elif kind == "fsdp":
            fully_shard(self.net.first)
            fully_shard(self.net)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01, fused=True)

    def step(self, number: int) -> float:
        """One step on this process's part of the batch; the global loss."""
        dice = torch.Generator().manual_seed(number)
        part = BATCH // self.process.world
        first = self.process.rank * part
        x = torch.randn(BATCH, 5, generator=dice)[first : first + part]
        x = x.to(self.process.device)
        self.optimizer.zero_grad(set_to_none=True)
        loss = (self.forward(x) - x[:, :3]).square().mean()
        loss.backward()
        self.optimizer.step()
        return self.process.sum(loss.item())[0]

    def tensors(self) -> dict[str, Tensor]:
        """All that decides the future, whole, by name; but for buffers equal in all processes."""
        options = StateDictOptions(full_state_dict=True)
        model, optimizer = get_state_dict(self.net, self.optimizer, options=options)
        found = {f"model.{name}": value for name, value in model.items()}
        for name, entries in optimizer.get("state", {}).items():
            found |= {f"{name}.{key}": value for key, value in entries.items()}
        return {name: value.clone() for name, value in found.items()}

    def checkpointer(self, folder: Path, digest: str = "one", **settings: Any) -> Checkpointer:
        """Of this training's state; checkpoints are asked for, not due, unless settings differ."""
        chosen = CheckpointSettings.model_validate({"max_lost_steps": 10**6, **settings})
        state = (self.net, self.optimizer)
        return Checkpointer(folder, digest, *state, chosen, self.process)


def alone() -> Process:
    """The only process."""
    return Process(0, 1, CPU)


@contextmanager
def group(meet: Path, rank: int, world: int) -> Iterator[Process]:
    """One of `world` processes that meet at a file."""
    torch.set_num_threads(1)
    if world == 1:
        yield alone()
        return
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    try:
        yield Process(rank, world, CPU)
    finally:
        dist.destroy_process_group()


def on_ranks(world: int, work: Callable[..., None], *args: object) -> None:
    """Run `work(rank, *args)` in `world` new processes; raises if one of them does."""
    mp.spawn(work, args, nprocs=world)
