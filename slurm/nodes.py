"""What the nodes of a partition have, and what of a request none of them can give."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slurm.settings import SlurmSettings

FORMAT = "%N|%R|%c|%m|%f"
"""Of `sinfo --Node --format=`: node, partition, cores, memory in MiB, features."""


@dataclass(frozen=True)
class Node:
    """A node as one of its partitions has it."""

    partition: str
    cores: int
    memory_gb: float
    features: frozenset[str]


def parse(text: str) -> list[Node]:
    """What `sinfo --noheader --Node` prints in `FORMAT`."""
    nodes = []
    for line in text.splitlines():
        _, partition, cores, memory_mb, features = line.strip().split("|", 4)
        names = frozenset() if features == "(null)" else frozenset(features.split(","))
        nodes.append(Node(partition, int(cores), int(memory_mb.rstrip("+")) / 1024, names))
    return nodes


def unmet(
    nodes: Sequence[Node], stage: str, settings: SlurmSettings, processes: int = 1
) -> Iterator[str]:
    """What to change of the request of a stage that has so many processes on a node."""
    if not nodes:
        return
    asked = settings.resources(stage)
    memory_gb = max(node.memory_gb for node in nodes)
    if (asked.memory_gb or 0) > memory_gb:
        key = settings.key(stage, "memory_gb")
        yield f"its nodes have {memory_gb:g} GiB: set {key} to that or less"
    cores = max(node.cores for node in nodes)
    if (asked.cpus or 1) * processes > cores:
        each = f" for {processes} processes" if processes > 1 else ""
        key = settings.key(stage, "cpus")
        yield f"its nodes have {cores} cores{each}: set {key}: {max(1, cores // processes)}"
    known = frozenset[str]().union(*(node.features for node in nodes))
    # `a&b|c`; brackets and `*4` say how many nodes.
    words = re.findall(r"[\w.-]+", re.sub(r"\*\d+", "", asked.constraint or ""))
    if words and not known & set(words):
        there = f"they have {', '.join(sorted(known))}" if known else "they have no features"
        yield f"{there}: change {settings.key(stage, 'constraint')}"
