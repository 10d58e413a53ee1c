"""Real processes in a gloo group, started quickly."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def together(folder: Path, world: int, work: Callable[..., None], *args: object) -> None:
    """Run `work(rank, world, folder, *args)` in `world` processes; in a group unless it is one.

    They are forked from a server that has imported torch and open_clip once, for all tests.
    """
    multiprocessing.set_forkserver_preload(["torch", "open_clip", "tests.train.ranks"])
    mp.start_processes(
        _member, (world, str(folder), work, args), nprocs=world, start_method="forkserver"
    )


def _member(
    rank: int, world: int, folder: str, work: Callable[..., None], args: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if world > 1:
        meet = f"file://{folder}/meet-{work.__name__}-{world}"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    work(rank, world, Path(folder), *args)
    if world > 1:
        dist.destroy_process_group()
