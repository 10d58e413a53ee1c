"""A real SLURM on this machine, for tests: a controller, nodes with fake GPUs, three partitions.

`with start() as cluster:` brings it up, and whatever becomes of this process, all that it started
ends. Clusters side by side do not meet: each has its own folder (0700), ports and job numbers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import conf
from tests.cluster.keeper import NODE_VARIABLE, descendants, environment

PACKAGES = ("slurmctld", "slurmd", "slurm-client")
_ROOT = Path(__file__).parents[2]
_POLL_S = 0.05


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    path = conf.search_path()
    absent = [
        name for name in ("slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=path)
    ]
    if not absent:
        return ""
    return f"{', '.join(absent)} not found; as root: apt-get install {' '.join(PACKAGES)}"


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path
    nodes: tuple[str, ...]
    keeper: subprocess.Popen[bytes]

    @property
    def conf(self) -> Path:
        """What `SLURM_CONF` must name for SLURM's commands to speak to this cluster."""
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """That of a login node: `SLURM_CONF`, and no trace of a job that this may run in."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        return {**kept, "SLURM_CONF": str(self.conf)}

    def run(self, *command: str, stdin: str = "") -> str:
        """Output of a command on the login node; raises `RuntimeError` with what it said."""
        done = subprocess.run(
            command,
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout}")
        return done.stdout

    def submit(self, script: str, *options: str) -> str:
        """Hand a shell script to sbatch and return the job's number; its output is `output()`."""
        log = f"--output={self.folder}/output/%A_%a_%N.log"
        script = f"#!/bin/bash\n{script}\n"
        given = any(option.startswith(("-o", "--output")) for option in options)
        options = options if given else (log, "--open-mode=append", *options)
        return self.run("sbatch", "--parsable", *options, stdin=script).strip()

    def output(self, job: str) -> str:
        """What the elements of a job of `submit` wrote, whole lines, in the order of files."""
        found = sorted((self.folder / "output").glob(f"{job}_*.log"))
        return "".join(path.read_text() for path in found)

    def jobs(self, job: str) -> list[dict[str, str]]:
        """What the controller knows of a job, one entry an array element; [] once forgotten."""
        try:
            text = self.run("scontrol", "show", "job", "--oneliner", job)
        except RuntimeError as error:
            if "Invalid job id" in str(error):
                return []
            raise
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines() if line]

    def states(self, job: str) -> list[str]:
        """The state of every element of a job."""
        return [entry["JobState"] for entry in self.jobs(job)]

    def wait(self, job: str, *states: str, timeout_s: float = 60) -> list[dict[str, str]]:
        """Wait until every element of a job is in one of `states`."""
        self.until(
            lambda: (found := self.states(job)) and set(found) <= set(states),
            f"job {job} to be {' or '.join(states)}",
            timeout_s,
        )
        return self.jobs(job)

    def until(self, holds: Callable[[], object], what: str, timeout_s: float = 60) -> object:
        """Ask until the answer is true, and return it; `TimeoutError` says what the queue had."""
        deadline = time.monotonic() + timeout_s
        while not (answer := holds()):
            if time.monotonic() > deadline:
                queue = self.run("squeue", "--all") + self.run("sinfo", "--Node", "--long")
                raise TimeoutError(f"waited {timeout_s:g} s for {what}\n{queue}")
            time.sleep(_POLL_S)
        return answer

    def occupy(self, nodes: int | None = None, seconds: float = 600) -> str:
        """An urgent job that takes whole nodes (all of them), from whoever has them."""
        count = len(self.nodes) if nodes is None else nodes
        options = ("--partition=urgent", "--exclusive", f"--nodes={count}")
        return self.submit(f"sleep {seconds}", *options)

    def node_states(self) -> dict[str, str]:
        """Node to state as sinfo has it: `idle`, `alloc`, `mix`, `down`; a `*` says silent."""
        text = self.run("sinfo", "--noheader", "--Node", "--format=%N %t")
        return dict(line.split() for line in text.splitlines())

    def kill_node(self, name: str, *, tasks_live: bool = False) -> None:
        """End a node without a word, as power loss does; with `tasks_live`, as a lost network does:
        its slurmd and slurmstepds are gone, what the jobs started goes on."""
        slurmd = int((self.folder / "pids" / name).read_text())
        everything = descendants(self.keeper.pid)
        daemons = [p for p in everything if environment(p).get(NODE_VARIABLE) == name]
        doomed = [slurmd] + [p for p in daemons if p != slurmd]
        if not tasks_live:
            doomed += [task for pid in daemons for task in descendants(pid)]
        for pid in doomed:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def start_node(self, name: str) -> None:
        """Bring a node back, and wait until the cluster uses it."""
        _request(self.folder, name)
        self.until(lambda: self.node_states()[name] in ("idle", "mix", "alloc"), f"node {name}")

    def restart_controller(self) -> None:
        """Stop slurmctld as an administrator does and start it again; jobs go on meanwhile."""
        pid = int((self.folder / "pids" / "slurmctld").read_text())
        os.kill(pid, signal.SIGTERM)
        self.until(lambda: pid not in descendants(self.keeper.pid), "slurmctld to end")
        _request(self.folder, "slurmctld")
        self._await_controller()

    def configure(self, **settings: object) -> None:
        """Change lines of slurm.conf, such as `MaxArraySize=11`, and have all daemons read it."""
        path = self.folder / "spec.json"
        spec = json.loads(path.read_text())
        spec["settings"] |= {key: str(value) for key, value in settings.items()}
        path.write_text(json.dumps(spec))
        slot = int((self.folder / "slot").read_text())
        conf.write(self.folder, slot, spec["nodes"], spec["settings"])
        self.run("scontrol", "reconfigure")
        self._await_controller()

    def clear(self) -> None:
        """Cancel every job and wait until all nodes are idle."""
        ids = self.run("squeue", "--all", "--noheader", "--format=%A").split()
        if ids:
            self.run("scancel", *set(ids))
        self._await_idle(60)

    def _await_idle(self, timeout_s: float) -> None:
        idle = dict.fromkeys(self.nodes, "idle")
        self.until(lambda: self.node_states() == idle, "all nodes to be idle", timeout_s)

    def _await_controller(self) -> None:
        def answers() -> bool:
            try:
                return "UP" in self.run("scontrol", "ping")
            except RuntimeError:
                return False

        deadline = time.monotonic() + 30
        while not answers():
            if time.monotonic() > deadline:
                raise TimeoutError(f"slurmctld does not answer\n{_logs(self.folder)}")
            time.sleep(_POLL_S)


def bring_up(nodes: int = 4, *, owner: int = 0, **settings: object) -> Cluster:
    """Start a cluster and wait until all its nodes are idle.

    It ends with the process `owner`, the one that calls this, or else with `bring_down`. `settings`
    are lines of slurm.conf. Raises `RuntimeError` with the daemons' last words if it does not come.
    """
    if reason := missing():
        raise RuntimeError(reason)
    folder = Path(tempfile.mkdtemp(prefix="openwit-slurm-"))  # mkdtemp makes it 0700
    for name in ("logs", "output", "pids", "spool", "start", "state"):
        (folder / name).mkdir()
    spec = {"nodes": nodes, "settings": {key: str(value) for key, value in settings.items()}}
    (folder / "spec.json").write_text(json.dumps(spec))
    for name in ("slurmctld", *conf.node_names(nodes)):
        _request(folder, name)
    with (folder / "logs" / "keeper.out").open("wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.keeper", str(folder), str(owner)],
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the tests, which then end it
        )
    (folder / "pids" / "keeper").write_text(str(keeper.pid))
    cluster = Cluster(folder, conf.node_names(nodes), keeper)
    try:
        deadline = time.monotonic() + 30
        while not cluster.conf.exists():
            if keeper.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the cluster's keeper did not start")
            time.sleep(_POLL_S)
        cluster._await_controller()
        cluster._await_idle(30)
    except BaseException as error:
        words = _logs(folder)
        bring_down(folder)
        keeper.wait()
        if isinstance(error, (RuntimeError, TimeoutError)):
            raise RuntimeError(f"{error}\n{words}") from error
        raise
    return cluster


def bring_down(folder: Path) -> None:
    """End a cluster of `bring_up` and everything that it started; its folder goes with it."""
    try:
        keeper = int((folder / "pids" / "keeper").read_text())
    except FileNotFoundError:
        return
    command = Path(f"/proc/{keeper}/cmdline")
    while command.exists() and str(folder).encode() in command.read_bytes():
        try:
            os.kill(keeper, signal.SIGTERM)
        except ProcessLookupError:
            break
        time.sleep(_POLL_S)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def start(nodes: int = 4, **settings: object) -> Iterator[Cluster]:
    """A cluster for as long as the block lasts."""
    cluster = bring_up(nodes, owner=os.getpid(), **settings)
    try:
        yield cluster
    finally:
        bring_down(cluster.folder)
        cluster.keeper.wait()


def _request(folder: Path, name: str) -> None:
    """Ask the keeper to start a daemon."""
    (folder / "start" / name).touch()


def _logs(folder: Path) -> str:
    """The last lines of every daemon."""
    parts = []
    for path in sorted((folder / "logs").glob("*")):
        lines = path.read_text(errors="replace").splitlines()[-8:]
        parts += [f"--- {path.name}", *lines] if lines else []
    return "\n".join(parts)
