"""advance(): compare the disk with the plan, hand over what is missing, stage by stage.

It keeps no state of its own: whoever calls it, whenever, it goes on from what is published.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from pipeline import files, manifest
from pipeline.config import ConfigError, UserError, dump
from pipeline.executor import NEVER_RETRIED, Ended, Executor, Outcome
from pipeline.manifest import Manifest, find
from pipeline.stage import Attempt, Planned, Run, Stage
from pipeline.stop import StopFlag, Stopped

log = logging.getLogger(__name__)


class TasksFailed(UserError):
    """Tasks that failed in all their attempts; the message lists them with their logs."""

    exit_code: ClassVar[int] = 4


class Watch(Protocol):
    """Sees a run go on: a progress display, or a log."""

    def begin(self, stage: Stage, total: int, done: int) -> None:
        """A phase of `stage` has `total` tasks known so far, `done` of them published."""

    def tick(self, stage: Stage, outcome: Outcome | None) -> None:
        """A task ended, or some time passed."""

    def end(self, stage: Stage, manifests: Sequence[Manifest], ran: int) -> None:
        """All tasks of `stage` are published; `ran` of them were run now."""


class Unwatched:
    """A `Watch` that says nothing."""

    def begin(self, stage: Stage, total: int, done: int) -> None:
        """Nothing."""

    def tick(self, stage: Stage, outcome: Outcome | None) -> None:
        """Nothing."""

    def end(self, stage: Stage, manifests: Sequence[Manifest], ran: int) -> None:
        """Nothing."""


@dataclass
class Advance:
    """What one call did."""

    ran: dict[str, int] = field(default_factory=dict)
    """Tasks run, by stage; stages that were up to date have 0."""

    @property
    def idle(self) -> bool:
        """Whether there was nothing to run."""
        return not any(self.ran.values())


def begin(run: Run, first: Stage, stages: Iterable[Stage]) -> None:
    """Make the run folder; a run whose `first` stage cannot be planned gets none.

    Raises `ConfigError` if the folder cannot be written, or holds other things and nothing of a run
    of `stages`; a full disk's error goes on.
    """
    if not run.folder.exists():
        first.planned(run, 0, 0)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(run.folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it cannot be written")
        there = {path.name for path in run.folder.iterdir() if not path.name.startswith(".")}
        if there and not there & {"command.json", "config.yaml", *(s.name for s in stages)}:
            raise FileExistsError(errno.EEXIST, f"it is no run's folder, and holds {min(there)}")
    except OSError as error:
        if files.is_full(error):
            raise
        raise ConfigError(f"{run.folder}: no run can be kept here ({error.strerror}); choose"
                          " another folder with RUN=... or --run") from None  # fmt: skip


def advance(
    run: Run,
    stages: Sequence[Stage],
    executor: Executor,
    stop: StopFlag,
    watch: Watch,
    max_failed_tasks: float = 0.0,
) -> Advance:
    """Bring `stages`, in this order, up to date with the configuration.

    Of a stage that can lose tasks, a share of `max_failed_tasks` may fail and be left out.
    Raises `TasksFailed` at the end of the first stage with failures, `Stopped` after a stop was
    asked for, and `UserError` for whatever the user must put right.
    """
    describe(run, stages)
    result = Advance()
    for stage in stages:
        run.at = stage.name
        ran = _complete(run, stage, executor, stop, watch, max_failed_tasks)
        result.ran[stage.name] = ran
    return result


def describe(run: Run, stages: Sequence[Stage]) -> None:
    """Write what `status` needs to know without reading the configuration: RUN/stages.json.

    A part of the stages that are known already, such as training alone, leaves their order be.
    """
    files.write_atomic(run.folder / "config.yaml", dump(run.config))
    path = run.folder / "stages.json"
    known = json.loads(path.read_text()) if path.exists() else []
    rows = [{"name": stage.name, "unit": stage.unit} for stage in stages]
    if any(row not in known for row in rows):
        files.write_atomic(path, json.dumps(rows, indent=1))


def replan(run: Run, stages: Sequence[Stage]) -> None:
    """Plan anew those of `stages` that were planned before what they read was made again.

    What they made of the earlier inputs is then theirs no more, until those are back.
    """
    for stage in stages:
        if not (run.stage_folder(stage.name) / "plan.json").exists():
            continue
        planned: list[Planned] = []
        try:
            for phase in range(1 + len(stage.then)):
                planned += stage.planned(run, phase, len(planned))
        except UserError:
            pass  # some inputs are still to be made
        run.save_plan(stage.name, planned)


def outdated(run: Run, stages: Sequence[Stage], max_failed_tasks: float = 0.0) -> Stage | None:
    """The first stage with something to run, or None; plans as `advance` would, writes nothing."""
    for stage in stages:
        done: list[Planned] = []
        for phase in range(1 + len(stage.then)):
            done += stage.planned(run, phase, len(done))
            run.consider(stage.name, done)
            if _missing(run, stage, done, max_failed_tasks):
                return stage
    return None


def _complete(
    run: Run,
    stage: Stage,
    executor: Executor,
    stop: StopFlag,
    watch: Watch,
    max_failed_tasks: float,
) -> int:
    """Run what is missing of one stage; the number of tasks that ran."""
    folder = run.stage_folder(stage.name)
    for name in ("done", "store", "logs", "live", "failed"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    planned: list[Planned] = []
    ran = 0
    for phase in range(1 + len(stage.then)):
        stop.check()
        planned += stage.planned(run, phase, len(planned))
        run.save_plan(stage.name, planned)
        missing = _missing(run, stage, planned, max_failed_tasks)
        watch.begin(stage, len(planned), len(planned) - len(missing))
        if not missing:
            continue
        for task in missing:
            manifest.withdraw(folder, task.fingerprint)
            (folder / "failed" / f"{task.task.index:05d}.json").unlink(missing_ok=True)
        failed = []
        stopped = False
        for outcome in executor.submit(run, stage, missing):
            watch.tick(stage, outcome)
            stopped |= outcome is not None and outcome.ended is Ended.STOPPED
            if outcome and outcome.ended is Ended.FAILED:
                failed.append(outcome)
                _record_failure(folder, outcome)
        stop.check()
        if failed and not _leave_out(run, stage, planned, failed, max_failed_tasks):
            raise TasksFailed(_describe_failures(stage, failed))
        if stopped:
            raise Stopped(f"a signal to a task of {stage.name}")
        run.save_plan(stage.name, planned)  # also forgets what was known of the outputs
        ran += len(missing)
    manifests = run.manifests(stage.name)
    missing = _missing(run, stage, planned, max_failed_tasks)
    assert not missing, f"{stage.name}: a task ended without its manifest"
    for published in manifests:
        manifest.expose(folder, published)
    fingerprints = [published.fingerprint for published in manifests]
    files.write_atomic(folder / "complete.json", json.dumps(fingerprints))
    manifest.sweep(folder, manifests)
    if ran:  # else what an unfinished change of the configuration has made is still of use to it
        manifest.prune(folder, manifests)
    watch.end(stage, manifests, ran)
    return ran


def work_on(run: Run, stage: Stage, planned: Planned, attempt: int, stop: StopFlag) -> Manifest:
    """One attempt at a task, in this process: work into a private folder, then publish it."""
    stage_folder = run.stage_folder(stage.name)
    index = planned.task.index
    if done := find(stage_folder, planned.fingerprint):
        return done
    folder = stage_folder / "store" / f"{index:05d}.{files.attempt_name()}"
    folder.mkdir(parents=True)
    live = stage_folder / "live" / f"{index:05d}.json"
    live.parent.mkdir(exist_ok=True)
    partial = stage_folder / "partial" / planned.fingerprint[:16]
    began = time.monotonic()
    try:
        this = Attempt(run, planned.task, folder, stop, live, partial)
        this.progress(0)
        stats = stage.work(this)
        published = manifest.publish(
            stage_folder,
            folder,
            index=index,
            fingerprint=planned.fingerprint,
            stats=stats,
            seconds=time.monotonic() - began,
            attempt=attempt,
        )
    except BaseException:
        done = find(stage_folder, planned.fingerprint)
        if done is None or done.store != folder.name:  # else it is published, whatever failed then
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        live.unlink(missing_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    return published


def _record_failure(folder: Path, outcome: Outcome) -> None:
    """RUN/<stage>/failed/<index>.json, for `status`; a later success makes it void."""
    record = {"reason": outcome.reason, "log": str(outcome.log), "exit_code": outcome.exit_code}
    path = folder / "failed" / f"{outcome.task.index:05d}.json"
    files.write_atomic(path, json.dumps(record, indent=1))


def _missing(
    run: Run, stage: Stage, planned: Sequence[Planned], max_failed_tasks: float
) -> list[Planned]:
    """Tasks without a manifest, but for those that were left out and still may be."""
    folder = run.stage_folder(stage.name)
    missing = [p for p in planned if find(folder, p.fingerprint) is None]
    left_out = run.left_out(stage.name) if stage.can_lose_tasks else {}
    remaining = [p for p in missing if p.fingerprint not in left_out]
    may_stay_out = len(missing) - len(remaining) <= max_failed_tasks * len(planned)
    return remaining if may_stay_out else missing


def _leave_out(
    run: Run,
    stage: Stage,
    planned: Sequence[Planned],
    failed: Sequence[Outcome],
    max_failed_tasks: float,
) -> bool:
    """Record that the stage does without the tasks that failed, if it may: left_out.json."""
    folder = run.stage_folder(stage.name)
    missing = [p for p in planned if find(folder, p.fingerprint) is None]
    if not stage.can_lose_tasks or len(missing) > max_failed_tasks * len(planned):
        return False
    known = run.left_out(stage.name)
    known |= {planned[outcome.task.index].fingerprint: outcome.reason for outcome in failed}
    reasons = {p.fingerprint: known[p.fingerprint] for p in missing}
    files.write_atomic(folder / "left_out.json", json.dumps(reasons, indent=1))
    log.warning(
        "%s: %d of %d tasks are left out after all their attempts; max_failed_tasks allows it",
        *(stage.name, len(missing), len(planned)),
    )
    return True


def _describe_failures(stage: Stage, failed: Sequence[Outcome]) -> str:
    is_final = all(outcome.exit_code in NEVER_RETRIED for outcome in failed)
    what = "put right what they say, then the same" if is_final else "the same"
    lines = [f"{stage.name}: {len(failed)} task(s) failed; {what} command tries them again"]
    for outcome in failed[:10]:
        lines.append(f"  task {outcome.task.index}: {outcome.reason}; log: {outcome.log}")
    if len(failed) > 10:
        lines.append(f"  and {len(failed) - 10} more")
    return "\n".join(lines)
