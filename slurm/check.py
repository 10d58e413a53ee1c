"""Can this cluster do what a configuration asks of it? What its controller says, and what jobs see.

Every finding is fine, worth a note, or something without which runs will fail and what to do then.
"""

from __future__ import annotations

import getpass
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from slurm import nodes, probe, queue
from slurm.nodes import Node
from slurm.settings import DRIVER, Resources, SlurmSettings

EXIT_UNFIT = 2
_PROBE_MINUTES = 5


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    found: str
    advice: str = ""
    """What it means for a run, or what to do; empty if it is fine."""
    must: bool = False
    """Whether runs fail unless that is done."""


Fields = Mapping[str, str]


def check(
    settings: SlurmSettings,
    place: Path,
    patience_s: float = 600,
    train_nodes: tuple[int, int] = (1, 1),
) -> list[Finding]:
    """Look at the cluster that SLURM's commands speak to from here.

    `place` is the folder below which runs will be. Jobs that have not started within `patience_s`
    seconds are cancelled, and the finding says why they waited. `train_nodes` are the fewest and
    the most nodes that training asks for. Raises `QueueUnknown` where there
    is no cluster.
    """
    config = parse_config(queue.output(["scontrol", "show", "config"]))
    partitions = parse_lines(queue.output(["scontrol", "show", "partition", "--oneliner"]))
    gpus = parse_gpus(queue.output(["sinfo", "--noheader", "--format=%R|%G"]))
    there = nodes.parse(queue.output(["sinfo", "--noheader", "--Node", f"--format={nodes.FORMAT}"]))
    findings = [
        *of_limits(config, settings),
        *of_user(config, settings),
        *of_partitions(config, partitions, gpus),
        *of_requests(partitions, gpus, settings, there),
        *of_training(partitions, settings, train_nodes),
        *of_time(settings),
        of_preemption(config),
    ]
    limits = {entry["PartitionName"]: minutes(entry["MaxTime"]) for entry in partitions}
    asked = {name: settings.resources(name) for name in ("default", DRIVER, *settings.stages)}
    asked = {name: _short(resources, limits) for name, resources in asked.items()}
    for seen in probe.run(asked, settings, place, patience_s):
        findings += of_job(seen)
    return findings


def table(findings: Sequence[Finding]) -> Table:
    """The findings, for a terminal."""
    found = Table(show_lines=False)
    for heading in ("", "what", "found", "what it means"):
        found.add_column(heading, overflow="fold")
    for finding in findings:
        verdict = "to do" if finding.must else "note" if finding.advice else "fine"
        style = {"to do": "bold red", "note": "yellow", "fine": ""}[verdict]
        found.add_row(verdict, finding.what, finding.found, finding.advice, style=style)
    return found


def of_limits(config: Fields, settings: SlurmSettings) -> Iterator[Finding]:
    """Version and size of arrays and of the queue."""
    yield Finding("SLURM", f"{config['SLURM_VERSION']}, cluster {config['ClusterName']}")
    most = int(config["MaxArraySize"]) - 1  # MaxArraySize - 1 is the highest index, and 0 the first
    advice = f"set slurm.max_array: {most}" if settings.max_array > most else ""
    found = f"{config['MaxArraySize']}, slurm.max_array is {settings.max_array}"
    yield Finding("MaxArraySize", found, advice, must=bool(advice))
    most = int(config["MaxJobCount"])
    advice = f"set slurm.max_submitted below {most}" if settings.max_submitted >= most else ""
    found = f"{most} in the whole queue, slurm.max_submitted is {settings.max_submitted}"
    yield Finding("MaxJobCount", found, advice, must=bool(advice))


def of_user(config: Fields, settings: SlurmSettings) -> Iterator[Finding]:
    """How many jobs this user may have in the queue, where an accounting database says so."""
    what = "jobs of a user"
    if not config["AccountingStorageType"].endswith("slurmdbd") or not shutil.which("sacctmgr"):
        yield Finding(what, "no accounting database, so no limits")
        return
    show = ["sacctmgr", "--noheader", "--parsable2", "show"]
    user = getpass.getuser()
    rows = queue.output([*show, "assoc", f"user={user}", "format=account,maxsubmit,qos"])
    qos = dict(_pairs(queue.output([*show, "qos", "format=name,maxsubmitpu"])))
    limits: dict[str, int] = {}
    for row in rows.splitlines():
        account, most, allowed = row.split("|")
        given = [(f"account {account}", most)]
        given += [(f"QOS {name}", qos.get(name, "")) for name in allowed.split(",")]
        for where, text in given:
            if text.isdigit():
                limits[where] = min(int(text), limits.get(where, int(text)))
    if not rows.strip():
        must = "associations" in config.get("AccountingStorageEnforce", "")
        advice = "ask an administrator for an account" if must else ""
        yield Finding(what, f"{user} has no account in the database", advice, must)
    elif not limits:
        yield Finding(what, "no limit in the accounting database")
    named = {f"account {asked.account}" for asked in _asked(settings).values()}
    named |= {f"QOS {asked.qos}" for asked in _asked(settings).values()}
    for where, limit in sorted(limits.items()):
        above = settings.max_submitted > limit
        advice = f"set slurm.max_submitted: {limit}, if jobs use it" if above else ""
        must = above and (len(limits) == 1 or where in named)
        yield Finding(what, f"{where}: {limit} in the queue", advice, must)


def of_partitions(
    config: Fields, partitions: Sequence[Fields], gpus: Mapping[str, int]
) -> Iterator[Finding]:
    """Size, limits and preemption of every partition."""
    preempts = config["PreemptType"] != "preempt/none"
    for entry in partitions:
        name = entry["PartitionName"]
        found = f"{entry['TotalNodes']} nodes, {entry['TotalCPUs']} cores"
        if gpus.get(name):
            found += f", {gpus[name]} GPUs a node"
        found += f", {_limit(entry['MaxTime'])}"
        if math.isfinite(default := minutes(entry["DefaultTime"])):
            found += f", {default:g} min unless a job says otherwise"
        mode = entry["PreemptMode"].split(",")[-1]
        grace = int(entry["GraceTime"])
        advice = ""
        if preempts and mode not in ("OFF", "GANG"):
            found += f", preempted: {mode.lower()} after {grace} s"
            if mode == "CANCEL":
                advice = "a preempted job is not run again by SLURM; that takes one of its attempts"
            elif mode == "REQUEUE" and grace < 30:
                advice = (
                    f"a preempted job is killed {grace} s after its signal: what it has not saved"
                    " by then is done again"
                )
        mark = " (default)" if entry["Default"] == "YES" else ""
        yield Finding(f"partition {name}{mark}", found, advice)


def of_requests(
    partitions: Sequence[Fields],
    gpus: Mapping[str, int],
    settings: SlurmSettings,
    there: Sequence[Node] = (),
) -> Iterator[Finding]:
    """Whether the partitions that the configuration names give what it asks them for."""
    known = {entry["PartitionName"]: entry for entry in partitions}
    default = next((name for name, e in known.items() if e["Default"] == "YES"), None)
    for key, asked in _asked(settings).items():
        for name in (asked.partition or default or "").split(","):
            what = f"{key} in {name or 'no partition'}"
            if not name:
                yield Finding(what, "there is no default one", f"set {key}.partition", must=True)
                continue
            if name not in known:
                advised = f"set {key}.partition to one of {', '.join(known)}"
                yield Finding(what, "no such partition", advised, must=True)
                continue
            advice = list(_unmet(key, asked, known[name], gpus.get(name, 0)))
            stage = key.rpartition(".")[2]
            each = (asked.processes_per_node or asked.gpus or 1) if stage == "train" else 1
            own = [node for node in there if node.partition == name]
            advice += nodes.unmet(own, stage, settings, each)
            asks = [f"{asked.gpus} GPUs"] if asked.gpus else []
            asks += [f"{asked.cpus} cores a process"] if asked.cpus else []
            asks += [f"{asked.memory_gb:g} GiB"] if asked.memory_gb else []
            asks += [f"nodes with {asked.constraint}"] if asked.constraint else []
            asks += [f"{asked.time_minutes} min"] if asked.time_minutes else []
            found = " and ".join(asks) or "asks for nothing special"
            yield Finding(what, found, "; ".join(advice), must=bool(advice))
            longest = min(minutes(known[name]["MaxTime"]), asked.time_minutes or math.inf)
            if not advice and longest <= settings.job_minutes:
                found = f"ends after {longest:g} min, slurm.job_minutes is {settings.job_minutes}"
                less = f"set slurm.job_minutes: {longest * 0.8:.0f}"
                yield Finding(what, found, less if longest >= 2 else "choose one for longer jobs")


def of_training(
    partitions: Sequence[Fields], settings: SlurmSettings, train_nodes: tuple[int, int]
) -> Iterator[Finding]:
    """Whether a partition has as many nodes as train together."""
    fewest, most = train_nodes
    known = {entry["PartitionName"]: entry for entry in partitions}
    default = next((name for name, e in known.items() if e["Default"] == "YES"), "")
    for name in (settings.resources("train").partition or default).split(","):
        if name not in known or most == 1:
            continue
        has = int(known[name]["TotalNodes"])
        advice = f"set train.nodes: {has}" if has < fewest else ""
        if fewest <= has < most:
            advice = f"training uses {has} at most"
        asked = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        found = f"train.nodes asks for {asked}, there are {has}"
        yield Finding(f"nodes of {name}", found, advice, must=has < fewest)


def of_time(settings: SlurmSettings) -> Iterator[Finding]:
    """Whether a job has time to save before its limit."""
    signal_s = settings.signal_seconds
    for key, asked in _asked(settings).items():
        if asked.time_minutes and asked.time_minutes * 60 <= signal_s:
            found = f"{asked.time_minutes} min, slurm.signal_seconds is {signal_s}"
            least = signal_s * 4 // 60 + 1
            where = settings.key(key.rpartition(".")[2], "time_minutes")
            advice = f"set {where}: {least} or more, or lower slurm.signal_seconds"
            yield Finding(f"{key}: time to save", found, advice, must=True)


def of_preemption(config: Fields) -> Finding:
    """Which signal a job gets before it must go. Releases spell the option differently."""
    what = "signal of preemption"
    if config["PreemptType"] == "preempt/none":
        return Finding(what, "nothing is preempted here")
    parameters = config.get("SlurmctldParameters", "") + config.get("PreemptParameters", "")
    if "send_user_signal" in parameters:
        return Finding(what, "SIGUSR2 at once, SIGTERM when the grace time is over")
    return Finding(
        what,
        "SIGTERM alone",
        "jobs stop on it too; to have them told by SIGUSR2 an administrator sets"
        " PreemptParameters=send_user_signal (SLURM 22.05 and before:"
        " SlurmctldParameters=preempt_send_user_signal)",
    )


def of_job(seen: probe.Seen) -> Iterator[Finding]:
    """What a job with the resources of some stages found where it ran."""
    what = f"a job of {', '.join(seen.stages)}"
    if seen.fault:
        yield Finding(what, seen.fault, seen.advice, must=True)
        return
    yield Finding(what, f"ran on {seen.host} after {seen.seconds:.0f} s, Python {seen.python}")
    yield Finding(what, "files go both ways between here and there")
    if seen.asked_gpus:
        found = f"{seen.asked_gpus} GPUs asked for, {seen.gpus} given, PyTorch sees"
        advice = ""
        if seen.gpus < seen.asked_gpus:
            advice = "SLURM does not assign GPUs here: the cluster's gres.conf lacks them"
        elif seen.torch_gpus < seen.asked_gpus:
            advice = "training could not use them: check the nodes' driver and PyTorch's build"
        yield Finding(what, f"{found} {seen.torch_gpus}", advice, must=bool(advice))
    if seen.cannot_requeue:
        yield Finding(
            what,
            f"cannot ask scontrol for itself: {seen.cannot_requeue}",
            "a job that reached its time limit could not be queued again; add what the nodes need"
            " to slurm.setup, such as PATH",
            must=True,
        )
    if seen.submits and seen.cannot_submit:
        advice = "jobs may not submit jobs here: add WAIT=1 to the commands"
        yield Finding(what, seen.cannot_submit, advice)
    elif seen.submits:
        yield Finding(what, "may submit jobs")


def parse_config(text: str) -> dict[str, str]:
    """`scontrol show config`: one `Key = value` a line."""
    found = re.findall(r"^(\S+)\s*=\s?(.*?)\s*$", text, re.MULTILINE)
    return dict(found)


def parse_lines(text: str) -> list[dict[str, str]]:
    """`scontrol show ... --oneliner`: `Key=value` side by side, one object a line."""
    lines = (dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines())
    return [line for line in lines if line]


def parse_gpus(text: str) -> dict[str, int]:
    """GPUs of a partition's best node, from `partition|gres` such as `gpu:a100:4(S:0-1)`."""
    most: dict[str, int] = {}
    for name, gres in _pairs(text):
        kinds = re.findall(r"\bgpu(?::[^:,()]+)??:(\d+)", gres)
        most[name] = max(most.get(name, 0), sum(int(count) for count in kinds))
    return most


def minutes(limit: str) -> float:
    """`2-00:00:00`, `00:30:00`, or infinity for a word such as UNLIMITED or NONE."""
    if not limit[:1].isdigit():
        return math.inf
    days, _, clock = limit.rpartition("-")
    hours, mins, seconds = (int(part) for part in clock.split(":"))
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def _asked(settings: SlurmSettings) -> dict[str, Resources]:
    keys = {"slurm.default": settings.default}
    return keys | {f"slurm.stages.{name}": settings.resources(name) for name in settings.stages}


def _short(asked: Resources, limits: Mapping[str, float]) -> Resources:
    """The same for a few minutes only, so that the job fits into a gap of the schedule."""
    longest = [limits.get(name, math.inf) for name in (asked.partition or "").split(",")]
    limit = max(1, int(min(_PROBE_MINUTES, asked.time_minutes or math.inf, *longest)))
    return asked.model_copy(update={"time_minutes": limit})


def _unmet(key: str, asked: Resources, entry: Fields, gpus: int) -> Iterator[str]:
    if entry["State"] != "UP":
        yield f"it is {entry['State']}: choose another for {key}.partition"
    if (asked.time_minutes or 0) > (most := minutes(entry["MaxTime"])):
        yield f"set {key}.time_minutes: {most:g}"
    if (asked.gpus or 0) > gpus:
        yield f"its nodes have {gpus}: lower {key}.gpus or choose another {key}.partition"


def _limit(limit: str) -> str:
    most = minutes(limit)
    return f"at most {most:g} min" if math.isfinite(most) else "no time limit"


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(row[0], row[2]) for row in (line.partition("|") for line in text.splitlines())]
