"""What to change when sbatch refuses a job: the setting that its words are about."""

from __future__ import annotations

import getpass
from collections.abc import Sequence

from slurm import queue
from slurm.settings import SlurmSettings

# In the order in which they are tried: an account is refused for its partition, too.
_ABOUT = (
    ("account", "account"),
    ("partition", "partition"),
    ("qos", "qos"),
    ("time limit", "time_minutes"),
    ("memory", "memory_gb"),
    ("cpu count", "cpus"),
    ("processors", "cpus"),
    ("feature", "constraint"),
    ("gres", "gpus"),
    ("generic resource", "gpus"),
    ("unrecognized option", "extra"),
)
"""Words of sbatch, and the field of `Resources` that they are about."""


def advice(said: str, stage: str, settings: SlurmSettings) -> str:
    """What to change so that sbatch takes a job of `stage`, which it refused with the words `said`.

    Asks the cluster which partitions, accounts or qualities of service there are, if that is it.
    """
    low = said.lower()
    if "controller" in low or "timed out" in low:
        return "the same command tries again"
    if "violates accounting" in low:
        return "`sacctmgr show qos` has the limits; lower slurm.max_submitted or what jobs ask for"
    if "node count" in low:
        return "lower train.nodes, or choose a larger partition"
    name = next((field for words, field in _ABOUT if words in low), None)
    if name is None:
        asked = settings.resources(stage).model_dump(exclude_defaults=True)
        keys = [settings.key(stage, field) for field in asked]
        return f"it asks for {', '.join(keys)}" if keys else "see the section slurm"
    key = settings.key(stage, name)
    if name not in ("partition", "account", "qos"):
        return f"change {key}"
    there = _there(name)
    return f"set {key} to one of {', '.join(there)}" if there else f"change {key}"


def _there(name: str) -> Sequence[str]:
    """Partitions, or the user's accounts or qualities of service; none where SLURM cannot say."""
    show = ["sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={getpass.getuser()}"]
    command = {
        "partition": ["sinfo", "--noheader", "--format=%R"],
        "account": [*show, "format=account"],
        "qos": [*show, "format=qos"],
    }[name]
    try:
        text = queue.output(command)
    except queue.QueueUnknown:
        return []
    return sorted({word for word in text.replace(",", "\n").split() if word})
