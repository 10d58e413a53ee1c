"""One process or many: who I am, which device is mine, and how processes agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import regex
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.stop import Stopped
from train.launch import Place, place

T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """This process among those that train one model together."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether it is set in any process; the same answer in all of them."""
        if self.world == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return tuple(bool(vote) for vote in votes.tolist())

    def sum(self, *values: float | Tensor) -> tuple[float, ...]:
        """Sums over all processes, equal in all to the last bit.

        Scalars that lie on the device are waited for once, together.
        """
        there = [value.to(torch.float64) for value in values if isinstance(value, Tensor)]
        here = [value for value in values if not isinstance(value, Tensor)]
        total = torch.tensor(here, dtype=torch.float64, device=self.device)
        total = torch.cat([torch.stack(there), total]) if there else total
        if self.world > 1:
            dist.all_reduce(total)
        sums = total.tolist()
        tensors, numbers = iter(sums[: len(there)]), iter(sums[len(there) :])
        return tuple(next(tensors if isinstance(v, Tensor) else numbers) for v in values)

    def led(self, work: Callable[[], T]) -> T:
        """What `work`, in the leading process, returns or raises, in all processes."""
        outcome: list[Any] = [None, None]
        if self.leads:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        if self.world > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in all of them."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def connected(environ: Mapping[str, str] | None = None) -> Iterator[Process]:
    """Join the processes that were started together; alone if this one was.

    NCCL where there are GPUs, gloo elsewhere. A process group that exists already is used.
    """
    environ = os.environ if environ is None else environ
    found = place(environ) or Place(0, 1, 0)
    if torch.cuda.is_available():
        device = torch.device("cuda", found.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if dist.is_initialized():
        yield Process(dist.get_rank(), dist.get_world_size(), device)
        return
    if found.world == 1:
        yield Process(0, 1, device)
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=_rendezvous(environ),
        rank=found.rank,
        world_size=found.world,
        timeout=timedelta(minutes=30),
    )
    try:
        yield Process(found.rank, found.world, device)
    except Stopped:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not after an error: it may wait for what never comes


def _rendezvous(environ: Mapping[str, str]) -> str:
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        return "env://"  # torchrun listens on that port itself
    host = _first_host(environ.get("SLURM_STEP_NODELIST", ""))
    port = 20_000 + int(environ.get("SLURM_JOB_ID", 0)) % 20_000
    return f"tcp://{host}:{port}"


def _first_host(nodes: str) -> str:
    """The first host of SLURM's notation: `gpu[003-007,9],cpu1` begins with gpu003."""
    if (match := regex.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)) is None:
        return "127.0.0.1"
    return f"{match[1]}{match[2] or ''}"
