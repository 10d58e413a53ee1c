"""The interfaces: Stage, Task, Attempt, Executor, and the Run they all work on.

A stage has two functions. `plan(run)` cuts its work into tasks: cheap, deterministic, reading only
what earlier stages published. `work(attempt)` does one task: it reads `attempt.inputs()`, writes
into `attempt.folder`, and returns `Stats`; the runner publishes that folder. Where a stage must
gather what its own tasks wrote (thresholds, an index), `then` holds further plans, each asked once
the tasks before it are done. No stage knows where it runs.
"""

from __future__ import annotations

import fnmatch
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import files, remote
from pipeline.config import MissingInput, Settings
from pipeline.manifest import Manifest, Output, digest, find
from pipeline.stats import Stats
from pipeline.stop import StopFlag


@dataclass(frozen=True)
class Task:
    """A piece of a stage's work; serialisable, and known by its fingerprint."""

    stage: str
    index: int
    reads: tuple[str, ...] = ()
    """References to inputs: `stage:name` for a published output, else a path or an address."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that tell this task from its siblings."""
    ignores: tuple[str, ...] = ()
    """Fields of the stage's settings that do not change what this task gives."""


@dataclass(frozen=True)
class Planned:
    """A task with its fingerprint: settings, input contents, stage version, parameters."""

    task: Task
    fingerprint: str


class Run:
    """A run folder with its configuration: where outputs are, and what they are made from."""

    def __init__(self, folder: Path, config: Settings) -> None:
        self.folder = folder
        self.config = config
        self.at = ""
        """The stage that the runner is at, or was when it ended."""
        self._outputs: dict[str, dict[str, tuple[Manifest, Output]]] = {}
        self._considered: dict[str, list[Planned]] = {}

    def stage_folder(self, stage: str) -> Path:
        """`RUN/<stage>`."""
        return self.folder / stage

    def settings(self, section: str) -> Any:
        """One section of the configuration, typed by the module that declares it."""
        return getattr(self.config, section)

    def plan(self, stage: str) -> list[Planned]:
        """The tasks that the runner last planned for a stage; empty if it never did."""
        if stage in self._considered:
            return self._considered[stage]
        path = self.stage_folder(stage) / "plan.json"
        try:
            rows = json.loads(path.read_text())
        except FileNotFoundError:
            return []
        tasks = []
        for row in rows:
            reads, ignores = tuple(row["reads"]), tuple(row["ignores"])
            task = Task(stage, row["index"], reads, row["params"], ignores)
            tasks.append(Planned(task, row["fingerprint"]))
        return tasks

    def save_plan(self, stage: str, planned: Sequence[Planned]) -> None:
        """Write `RUN/<stage>/plan.json`."""
        self._considered.pop(stage, None)
        rows = [{**asdict(p.task), "fingerprint": p.fingerprint} for p in planned]
        text = json.dumps(rows, indent=1)
        files.write_atomic(self.stage_folder(stage) / "plan.json", text)
        self._outputs.pop(stage, None)

    def consider(self, stage: str, planned: Sequence[Planned]) -> None:
        """Let `plan` give these tasks, here alone: nothing is written."""
        self._considered[stage] = list(planned)
        self._outputs.pop(stage, None)

    def manifests(self, stage: str) -> list[Manifest]:
        """Manifests of the planned tasks that are done, in task order."""
        folder = self.stage_folder(stage)
        found = ((p.task.index, find(folder, p.fingerprint)) for p in self.plan(stage))
        return [replace(manifest, index=index) for index, manifest in found if manifest]

    def left_out(self, stage: str) -> dict[str, str]:
        """Reasons of the tasks that the stage did without, after all their attempts failed, by
        fingerprint."""
        try:
            reasons = json.loads((self.stage_folder(stage) / "left_out.json").read_text())
        except FileNotFoundError:
            return {}
        planned = {p.fingerprint for p in self.plan(stage)}
        return {fingerprint: r for fingerprint, r in reasons.items() if fingerprint in planned}

    def completed(self, stage: str) -> list[Manifest]:
        """Manifests of a stage as it last was complete, whatever is planned now."""
        folder = self.stage_folder(stage)
        found = (find(folder, fingerprint) for fingerprint in self.complete(stage))
        return [manifest for manifest in found if manifest]

    def complete(self, stage: str) -> list[str]:
        """Fingerprints of a stage's tasks as it last was complete: of all its phases."""
        try:
            known: list[str] = json.loads((self.stage_folder(stage) / "complete.json").read_text())
        except FileNotFoundError:
            return []
        return known

    def find(self, pattern: str, endings: Sequence[str] = ()) -> list[str]:
        """References to the inputs that a pattern names, sorted; never empty.

        `stage:glob` looks among the outputs that a stage of this run published, any other pattern
        among files; a folder stands for the files below it that end with one of `endings`. Stages
        that read what is elsewhere find it with `remote.find`. Raises `MissingInput` naming the
        pattern.
        """
        stage, colon, glob = pattern.partition(":")
        if remote.is_remote(pattern):
            raise MissingInput(f"{pattern}: this must be a file; download it, and give its path")
        path = Path(pattern).expanduser()
        if colon and "/" not in stage:
            names = fnmatch.filter(self._published(stage), glob)
            found = [f"{stage}:{name}" for name in names]
        elif endings and path.is_dir():
            suffixes, files = tuple(endings), (p for p in path.rglob("*") if p.is_file())
            found = [str(file) for file in files if file.name.lower().endswith(suffixes)]
        else:
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            found = [str(p) for p in anchor.glob(str(path.relative_to(anchor))) if p.is_file()]
        if not found:
            raise MissingInput(f"{pattern}: {_why_none(path, pattern, endings)}")
        return sorted(found)

    def path(self, reference: str) -> Path:
        """The file behind a reference that is no address."""
        assert not remote.is_remote(reference), reference
        if (output := self._output(reference)) is not None:
            manifest, published = output
            return self.stage_folder(manifest.stage) / "store" / manifest.store / published.name
        return Path(reference)

    def identity(self, reference: str) -> str:
        """A name for the content behind a reference, for fingerprints.

        What is remote is known by its address, and nobody is asked: where a file was replaced by
        another, as Common Crawl never does, give it another address or remove what was made of it.
        """
        if remote.is_remote(reference):
            return f"address:{reference}"
        if (output := self._output(reference)) is not None:
            return output[1].sha256
        try:
            return files.identity(Path(reference))
        except OSError as error:
            raise MissingInput(f"{reference}: cannot be read ({error.strerror})") from None

    def _output(self, reference: str) -> tuple[Manifest, Output] | None:
        stage, colon, name = reference.partition(":")
        if not colon or "/" in stage or remote.is_remote(reference):
            return None
        if name not in (published := self._published(stage)):
            raise MissingInput(f"{reference}: stage {stage!r} has not published {name!r}")
        return published[name]

    def _published(self, stage: str) -> dict[str, tuple[Manifest, Output]]:
        """Outputs by name. Remembered until the stage's plan changes: references to a stage are
        followed only once the phase that made them is complete.
        """
        if stage not in self._outputs:
            manifests = self.manifests(stage)
            self._outputs[stage] = {o.name: (m, o) for m in manifests for o in m.outputs}
        return self._outputs[stage]


def _why_none(path: Path, pattern: str, endings: Sequence[str]) -> str:
    """Why a pattern names no file, and what would."""
    if path.is_dir():
        wanted = f"no file in it ends in {', '.join(endings)}"
        return wanted if endings else "a folder; name the files in it, as with /*"
    if path.is_file() and ":" in pattern:
        return f"before the colon stands the name of a stage; if this is a file, write ./{pattern}"
    if path.is_file():
        return "its brackets are read as a pattern; write [[] for each that opens"
    return "no such input; check the path in the configuration"


@dataclass
class Attempt:
    """One try at a task: all that `work` may touch."""

    run: Run
    task: Task
    folder: Path
    """Private and empty at first; what is in it when `work` returns is published."""
    stop: StopFlag
    live: Path | None = None
    """Where progress is written, for `status`."""
    partial: Path | None = None
    """A folder that outlives this attempt, until its task is published: what is left in it, the
    next attempt finds. Several may be at work at once. It is made by whoever uses it."""
    _last: float = field(default=float("-inf"), repr=False)
    _from: tuple[str, int, float] = field(default=("", 0, 0.0), repr=False)
    """Unit, count and Unix time from which this attempt counts."""

    @property
    def settings(self) -> Any:
        """The section of the configuration that carries the stage's name."""
        return self.run.settings(self.task.stage)

    def inputs(self) -> list[Path]:
        """The files behind `task.reads`, none of which is an address, in that order."""
        return [self.run.path(reference) for reference in self.task.reads]

    def progress(
        self, done: int, total: int | None = None, unit: str = "rows", note: str = ""
    ) -> None:
        """Say how far the task is, and in `note` how it goes; cheap enough for every record.

        An attempt that goes on from saved work begins with a `done` above 0: its rate is that of
        what came since.
        """
        now = time.monotonic()
        said_just_now = unit == self._from[0] and now - self._last < 1.0
        if unit != self._from[0] or done < self._from[1]:
            self._from = (unit, done, time.time())
        if self.live is None or said_just_now:
            return
        self._last = now
        beat = {"done": done, "total": total, "unit": unit, "note": note, "time": time.time()}
        beat |= {"from_done": self._from[1], "from_time": self._from[2]}
        beat |= {"pid": os.getpid(), "host": socket.gethostname()}
        # Processes that do the task together may write at the same time.
        temporary = self.live.with_name(f".{self.live.name}.{files.attempt_name()}")
        temporary.write_text(json.dumps(beat))
        temporary.replace(self.live)


Service = Callable[[Run], AbstractContextManager[Mapping[str, str]]]
"""Something that must be alive while a stage's tasks run; yields environment variables for them."""


def no_service(run: Run) -> AbstractContextManager[Mapping[str, str]]:
    """The service of a stage that needs none."""
    return nullcontext({})


def one_node(run: Run, processes_per_node: int) -> tuple[int, ...]:
    """The nodes of a stage that spans no more."""
    return (1,)


def no_follower(run: Run) -> tuple[str, ...]:
    """The follower of a stage that nobody looks at before its end."""
    return ()


@dataclass(frozen=True)
class Stage:
    """A named step of a run."""

    name: str
    needs: tuple[str, ...]
    """Stages whose outputs it reads, directly."""
    plan: Callable[[Run], list[Task]]
    work: Callable[[Attempt], Stats]
    then: tuple[Callable[[Run], list[Task]], ...] = ()
    """Later phases; each sees, through `run`, what the phases before it published."""
    unit: str = "rows"
    """What `Stats.rows_out` counts."""
    also: tuple[str, ...] = ()
    """Sections of the configuration, besides its own, that decide its result."""
    version: int = 1
    """Raise it when the code changes what comes out; old results are then made again."""
    service: Service = no_service
    can_lose_tasks: bool = False
    """Whether its result is of use without the tasks that fail in all their attempts, as far as
    the configuration's `max_failed_tasks` allows."""
    spans_nodes: bool = False
    """Its task is done by processes that are started together, one a GPU, on one node or several;
    it may take weeks and watches itself, so executors hold it to no limit of time or memory."""
    nodes: Callable[[Run, int], tuple[int, ...]] = one_node
    """Of a stage that spans nodes: how many will do, with so many processes on each, ascending.
    Raises `ConfigError` if none will."""
    follower: Callable[[Run], tuple[str, ...]] = no_follower
    """Of a stage that spans nodes: a command that looks, now and then while its task goes on, at
    what it has saved so far; empty if there is nothing to look at."""

    def planned(self, run: Run, phase: int, first: int) -> list[Planned]:
        """The tasks of a phase (0 is `plan`) with their fingerprints; they count from `first`."""
        sections = (self.name, *self.also)
        settings = {}
        for section in sections:
            value = getattr(run.config, section, None)
            settings[section] = value.identity() if isinstance(value, Settings) else value
        tasks = (self.plan, *self.then)[phase](run)
        indices = [task.index for task in tasks]
        assert indices == list(range(first, first + len(tasks))), f"{self.name}: {indices}"
        known: dict[str, str] = {}
        planned = []
        for task in tasks:
            for reference in task.reads:
                if reference not in known:
                    known[reference] = run.identity(reference)
            parts = {
                "stage": self.name,
                "version": self.version,
                "settings": {**settings, self.name: _without(settings[self.name], task.ignores)},
                "params": dict(task.params),
                "reads": [[Path(reference).name, known[reference]] for reference in task.reads],
            }
            planned.append(Planned(task, digest(parts)))
        assert len({p.fingerprint for p in planned}) == len(tasks), f"{self.name}: equal tasks"
        return planned


def _without(section: Any, names: Sequence[str]) -> Any:
    """A section's identity but for some fields, which must exist."""
    if not names:
        return section
    return {name: value for name, value in section.items() if name not in names}
