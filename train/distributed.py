"""One process or many: who I am, which device is mine, and how processes agree."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import regex
import torch
import torch.distributed as dist


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

    def sum(self, *values: float) -> tuple[float, ...]:
        """Sums over all processes."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def connected(environ: Mapping[str, str] | None = None) -> Iterator[Process]:
    """Join the processes that torchrun or srun started; alone if neither did.

    NCCL where there are GPUs, gloo elsewhere. A process group that exists already is used.
    """
    environ = os.environ if environ is None else environ
    rank, world, local = _place(environ)
    if torch.cuda.is_available():
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if dist.is_initialized():
        yield Process(dist.get_rank(), dist.get_world_size(), device)
        return
    if world == 1:
        yield Process(0, 1, device)
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=_rendezvous(environ),
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=30),
    )
    try:
        yield Process(rank, world, device)
    finally:
        dist.destroy_process_group()


def _place(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world, rank on this machine)."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank = int(environ["RANK"])
        return rank, int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", rank))
    # SLURM_NTASKS is also set in the batch script, of which there is one; the step's is not.
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environ:
        rank = int(environ["SLURM_PROCID"])
        return rank, int(environ["SLURM_STEP_NUM_TASKS"]), int(environ.get("SLURM_LOCALID", 0))
    return 0, 1, 0


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
