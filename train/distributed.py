"""One process or many: who I am, which device is mine, and how processes agree."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config import ConfigError
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
    """Where the processes meet: where torchrun says, else on the first node of the SLURM step."""
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if host and port:
        return "env://"  # torchrun listens on that port itself
    if not host:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise ConfigError(
                "several processes were started to train together, but nothing says where they "
                "meet: start them with torchrun or srun, or set MASTER_ADDR and MASTER_PORT"
            )
        host = first_host(nodes)
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            raise ConfigError(
                f"{host}, the first node of {nodes}, has no address on {socket.gethostname()} "
                f"({error.strerror}); set MASTER_ADDR to one, in slurm.setup for one"
            ) from None
    return f"tcp://{host}:{port or _port(environ)}"


def _port(environ: Mapping[str, str]) -> int:
    """Of 10000 to 29999, which lie below the ports that Linux gives to connections (32768 on).

    Every attempt at a job has another one, so that what is left of the last one is not met.
    """
    job, step, restarts = (
        int(environ.get(name, 0))
        for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    )
    return 10_000 + (job + 1_009 * step + 7_919 * restarts) % 20_000


def first_host(nodes: str) -> str:
    """The first host of SLURM's notation: `rack[01-03,7]gpu[4-5],cpu` begins with rack01gpu4."""
    first = re.match(r"(?:[^][,]|\[[^][]+])+(?=,|$)", nodes)
    host = re.sub(r"\[(\w+)[^]]*]", r"\1", first[0]) if first else ""
    if not re.fullmatch(r"[\w.-]+", host):
        raise ConfigError(f"SLURM's list of nodes, {nodes!r}, cannot be read; set MASTER_ADDR")
    return host
