"""Timing two ways of doing one thing on a machine that others use too."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def seconds(work: Callable[[], T]) -> tuple[float, T]:
    """Wall-clock seconds of one call, and what it returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def compete(
    ours: Callable[[], object], peer: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Best seconds of each over `rounds`, taken in turns so that neither has the quieter time.

    The garbage collector is off meanwhile: what the benchmark itself holds would slow down
    whichever side makes more Python objects.
    """
    best_ours = best_peer = float("inf")
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            best_ours = min(best_ours, seconds(ours)[0])
            best_peer = min(best_peer, seconds(peer)[0])
    finally:
        gc.enable()
    return best_ours, best_peer


def memory_mb(field: str) -> float:
    """Memory of this process in RAM, MB (Linux): now (`VmRSS`) or at most so far (`VmHWM`)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    """Let `VmHWM` start again from the memory in use now."""
    Path("/proc/self/clear_refs").write_text("5")


def cpu_seconds() -> float:
    """Processor time so far of this process and of the children that it has now (Linux)."""
    pid = os.getpid()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ticks = 0
    for process in (str(pid), *children):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime of proc_pid_stat(5)
    return ticks / os.sysconf("SC_CLK_TCK")
