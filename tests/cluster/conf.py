"""slurm.conf and gres.conf of a cluster that lives on one machine and in one folder.

Nothing asks for root, munge, cgroups or a database. The nodes are fake: each claims eight cores and
four GPUs, which are character devices that every machine has.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

GPUS = ("null", "zero", "full", "random")
"""slurmd takes any character device for a GPU; a plain file it refuses."""

PORTS = 64
"""Ports of one cluster: its controller's, then one a node."""
SLOTS = 20
"""Clusters that fit on a machine side by side: see `first_port` and `first_job`."""

PARTITIONS: Mapping[str, Mapping[str, object]] = {
    "normal": {"Default": "YES", "MaxTime": "INFINITE", "PriorityTier": 1, "GraceTime": 10},
    "short": {"MaxTime": "00:01:00", "PriorityTier": 1, "GraceTime": 10},
    "urgent": {"MaxTime": "INFINITE", "PriorityTier": 10, "PreemptMode": "OFF"},
}


def first_port(slot: int) -> int:
    """30000 to 31279: below the ports that Linux hands out (32768), above those of jobs."""
    return 30_000 + PORTS * slot


def first_job(slot: int) -> int:
    """Job numbers of clusters side by side differ, so ports that follow from them do too."""
    return 1 + 1000 * slot


def node_names(nodes: int) -> tuple[str, ...]:
    """n1, n2, ..."""
    assert 1 <= nodes < PORTS, f"a cluster has 1 to {PORTS - 1} nodes"
    return tuple(f"n{i}" for i in range(1, nodes + 1))


def search_path() -> str:
    """PATH with the place where Debian has the daemons, which only root's has."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@cache
def version() -> tuple[int, int]:
    """The release of SLURM that is installed, such as (22, 5)."""
    command = [shutil.which("slurmd", path=search_path()) or "slurmd", "-V"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


def write(folder: Path, slot: int, nodes: int, settings: Mapping[str, object]) -> None:
    """Write slurm.conf and gres.conf into `folder`; `settings` add to the lines or replace them."""
    lines = {**_settings(folder, slot), **settings}
    text = "".join(f"{key}={value}\n" for key, value in lines.items())
    names = node_names(nodes)
    for i, name in enumerate(names, 1):
        node = {
            "NodeName": name,
            "NodeHostname": socket.gethostname().partition(".")[0],
            "NodeAddr": "127.0.0.1",
            "Port": first_port(slot) + i,
            "CPUs": 8,
            "RealMemory": 16_384,
            "Gres": f"gpu:{len(GPUS)}",
            "State": "UNKNOWN",
        }
        text += _line(node)
    for name, keys in PARTITIONS.items():
        text += _line({"PartitionName": name, "Nodes": ",".join(names), **keys, "State": "UP"})
    (folder / "gres.conf").write_text("".join(f"Name=gpu File=/dev/{gpu}\n" for gpu in GPUS))
    temporary = folder / "slurm.conf.new"
    temporary.write_text(text)
    temporary.replace(folder / "slurm.conf")


def _settings(folder: Path, slot: int) -> dict[str, object]:
    host = socket.gethostname().partition(".")[0]
    settings: dict[str, object] = {
        "ClusterName": "local",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": first_port(slot),
        "SlurmUser": getpass.getuser(),
        "SlurmdUser": getpass.getuser(),
        "FirstJobId": first_job(slot),
        # Nobody proves who they are, so nobody from elsewhere may ask: listen on loopback only.
        "AuthType": "auth/none",
        "CredType": "cred/none",
        "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
        # A requeued job starts so many seconds later (120 by default, and for a number below 5).
        "AuthInfo": "cred_expire=5",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool" / "%n",
        "SlurmctldPidFile": folder / "state" / "slurmctld.pid",
        "SlurmdPidFile": folder / "spool" / "%n.pid",
        "SlurmctldLogFile": folder / "logs" / "slurmctld.log",
        "SlurmdLogFile": folder / "logs" / "%n.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SwitchType": "switch/none",
        # Memory is counted by looking at processes every second, and a job above its own is ended.
        "JobAcctGatherType": "jobacct_gather/linux",
        "JobAcctGatherFrequency": "task=1",
        "JobAcctGatherParams": "OverMemoryKill",
        "AccountingStorageType": "accounting_storage/none",
        # Nodes may claim more than the machine has.
        "SlurmdParameters": "config_overrides",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "DefMemPerCPU": 2048,
        "GresTypes": "gpu",
        "ReturnToService": 2,
        "MaxArraySize": 1001,
        # Decide at once instead of every half minute.
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "sched_interval=1,sched_min_interval=0,bf_interval=1,"
        "batch_sched_delay=0",
        "KillWait": 5,
        "SlurmdTimeout": 10,
        "MessageTimeout": 10,
        "BatchStartTimeout": 10,
        "JobRequeue": 1,
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
    }
    # Without it a preempted job gets SIGTERM alone, not the signal that it asked for.
    if version() < (23, 2):
        settings["SlurmctldParameters"] = "preempt_send_user_signal"
    else:
        settings["PreemptParameters"] = "send_user_signal"
    return settings


def _line(keys: Mapping[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in keys.items()) + "\n"
