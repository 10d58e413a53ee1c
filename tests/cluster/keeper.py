"""The process from which all others of a local cluster descend, so that it can end exactly those.

Linux gives orphans to the nearest ancestor that asked for them (PR_SET_CHILD_SUBREAPER): whatever a
daemon or a job leaves behind becomes a child of this process. It ends, and takes them all along,
when it is told to (SIGTERM) or when the process that wanted the cluster is gone, however it went.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from tests.cluster import conf

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_POLL_S = 0.05
NODE_VARIABLE = "OPENWIT_TEST_NODE"
"""Names the node in the environment of its slurmd, and so of the slurmstepds that it starts."""


def keep(folder: Path, owner: int) -> None:
    """Start the daemons that `folder/start/` asks for until this process is to end.

    `owner` is the parent without which the cluster is not wanted; 0 if it is to outlive that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
    ending = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ending
        ending = True

    signal.signal(signal.SIGTERM, end)
    spec = json.loads((folder / "spec.json").read_text())
    claim, slot = _claim_slot(spec["nodes"])
    conf.write(folder, slot, spec["nodes"], spec["settings"])
    (folder / "slot").write_text(str(slot))
    try:
        with claim:
            while not ending and owner in (0, os.getppid()):
                for request in sorted((folder / "start").iterdir(), reverse=True):
                    request.unlink()
                    _start(folder, request.name)
                _reap()
                time.sleep(_POLL_S)
            _end_descendants()
    finally:
        shutil.rmtree(folder)


def descendants(ancestor: int) -> list[int]:
    """Every process below `ancestor`, as /proc has it now."""
    children: dict[int, list[int]] = {}
    for pid, parent in _processes():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    pending = [ancestor]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def environment(pid: int) -> dict[str, str]:
    """What a process was started with; empty if it is gone."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def _processes() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended while we looked
            yield int(entry.name), int(fields[1])  # field 4 of proc_pid_stat(5)


def _claim_slot(nodes: int) -> tuple[socket.socket, int]:
    """A slot that no other cluster of this machine has and whose ports are free.

    The claim is a name in Linux's abstract socket namespace: whoever holds the socket has it, and
    it is free again when that process is gone.
    """
    for slot in range(conf.SLOTS):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0openwit-test-cluster-{slot}")
            for port in range(conf.first_port(slot), conf.first_port(slot) + nodes + 1):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        return claim, slot
    raise RuntimeError(f"all {conf.SLOTS} places for local clusters are taken on this machine")


def _start(folder: Path, name: str) -> None:
    config = str(folder / "slurm.conf")
    if name == "slurmctld":
        command = ["slurmctld", "-D", "-i", "-f", config]
    else:
        command = ["slurmd", "-D", "-f", config, "-N", name]
        (folder / "spool" / name).mkdir(exist_ok=True)
    names = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    with (folder / "logs" / f"{name}.out").open("ab") as log:
        process = subprocess.Popen(
            command,
            env={**names, "PATH": conf.search_path(), "SLURM_CONF": config, NODE_VARIABLE: name},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (folder / "pids" / name).write_text(str(process.pid))


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass  # there are none


def _end_descendants() -> None:
    """Daemons, steps, jobs: no signal but SIGKILL ends them all, and nothing is to be saved."""
    while below := descendants(os.getpid()):
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        _reap()
        time.sleep(0.01)


if __name__ == "__main__":
    keep(Path(sys.argv[1]), int(sys.argv[2]))
