"""Removal from everything that a run has published, so that no byte of a picture is left.

`settle` comes before a build: rows of `download` lose address and text, and staged tars the
picture, whose place is filled with zeros; verdicts of `screen`, which stay as they are for all
other pairs, stand for the new files too. `build` then finds the shards out of date that hold such
pairs: `pack` leaves them out after it has cut the survivors into shards, so all others keep their
bytes. `finish` comes after it: what earlier builds left is deleted, and RUN/removed/log.jsonl says
what was done. Each step may be repeated; what is in force is known from the requests alone, see
`removed`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_build import redact, removed
from pipeline import files, runner, status
from pipeline import manifest as published
from pipeline.config import UserError
from pipeline.lock import RunInUse, RunLock
from pipeline.manifest import digest, find
from pipeline.stage import Run, Stage

log = logging.getLogger(__name__)

KEPT_VERDICTS = redact.SCREEN
"""The stage that need not decide again: a purged dataset is the one that was built, less what was
removed. Else a cap or a duplicate that comes free would admit others, and move all shards."""


class RunsNow(UserError):
    """Tasks of the run are at work, so its files cannot be changed."""

    exit_code = 9


class StillThere(UserError):
    """Something that was to be removed is not."""

    exit_code = 5


def is_settled(run_folder: Path) -> bool:
    """Whether all requests have been carried out."""
    return _state(run_folder) == removed.in_force(run_folder)


def settle(run: Run, stages: Sequence[Stage], max_failed_tasks: float = 0.0) -> str:
    """Remove what requests name from `download`, if that is not done yet; names those requests.

    Raises `RunsNow` if there is something to do and tasks of the run are at work.
    """
    requests = removed.in_force(run.folder)
    if requests == _state(run.folder):
        return requests
    with _alone(run.folder):
        known = (run.folder / "stages.json").exists()
        busy = [s.name for s in status.read(run.folder) if s.running] if known else []
        if busy:
            raise RunsNow(
                f"{run.folder}: tasks of {', '.join(busy)} are running, or ended less than two"
                " minutes ago; removals are in force for what is fetched and trained from now on,"
                " and are carried out when `make purge` or `make build-dataset` is called again"
            )
        requests = removed.in_force(run.folder)
        kept = _keep_verdicts(run, stages, max_failed_tasks)
        redact.captions(run)  # before the texts are gone that it goes by
        rows = redact.outcomes(run)
        for stage in stages:
            if stage.name == KEPT_VERDICTS and kept:
                _take_over(run, stage, kept)
        for name in ("download", KEPT_VERDICTS):
            _tidy(run, name)
        show_uids(run.folder)
        log.info("removed: %d pairs lose picture, address and text in download", rows)
    return requests


def finish(run: Run, requests: str) -> None:
    """After the build: delete what no result names any more, see that nothing is left, and log it.

    Raises `StillThere` if files that this build does not make again hold something.
    """
    if requests == _state(run.folder):
        return
    with _alone(run.folder):
        for stage in ("download", KEPT_VERDICTS, "pack"):
            if manifests := run.manifests(stage):
                published.prune(run.stage_folder(stage), manifests)
        show_uids(run.folder)
        _check_all_gone(run)
        (run.folder / "removed" / "verdicts.json").unlink(missing_ok=True)
        record = {
            "time": round(time.time(), 3),
            "requests": len(removed.folders(run.folder)),
            "samples": _samples(run.folder),
            "fingerprint_before": removed.requests(run.folder)[-1]["fingerprint"],
            "fingerprint": removed.fingerprint(run.folder),
        }
        _append(run.folder / "removed" / "log.jsonl", json.dumps(record) + "\n")
        files.write_atomic(run.folder / "removed" / "done.json", json.dumps({"requests": requests}))


def _check_all_gone(run: Run) -> None:
    tombstones = removed.Tombstones(run.folder)
    rows = sum(int(tombstones.rows(table).sum()) for table in removed.outcomes(run))
    uids = pa.array([bytes.fromhex(uid) for uid in removed.uids(run.folder)], pa.binary(16))
    folder = run.stage_folder("pack")
    samples = 0
    for manifest in published.everything(folder):
        for output in manifest.outputs:
            if output.name.startswith("index"):
                path = folder / "store" / manifest.store / output.name
                column = pq.read_table(path, columns=["uid"])["uid"]
                samples += pc.sum(pc.is_in(column, value_set=uids)).as_py() or 0
    if rows or samples:
        raise StillThere(
            f"{run.folder}: {rows} rows of download and {samples} of pack's index are of removed"
            " pairs still, which this build did not make again; call `make build-dataset` with a"
            " configuration that ends at pack, and no other build at the same time"
        )


def show_uids(run_folder: Path) -> None:
    """`removed.txt` beside the packed dataset: for those who train on it from other runs, or copy
    it to elsewhere."""
    out = run_folder / "pack" / "out"
    if out.exists() and (uids := removed.uids(run_folder)):
        text = "".join(f"{uid}\n" for uid in uids)
        if not (path := out / "removed.txt").exists() or path.read_text() != text:
            files.write_atomic(path, text)


def summary(run_folder: Path) -> list[str]:
    """What was removed from a run, a line or none, for `status`."""
    requests = removed.requests(run_folder)
    if not requests:
        return []
    since = time.strftime("%Y-%m-%d", time.gmtime(requests[0]["time"]))
    samples = sum(request["samples"].get("in all", 0) for request in requests)
    state = "" if is_settled(run_folder) else (
        "; files still hold some: `make purge` or `make build-dataset` goes on")  # fmt: skip
    plural = "request" if len(requests) == 1 else "requests"
    return [f"removed: {samples:,} pairs by {len(requests)} {plural} since {since}{state}"]


def remains(run: Run) -> list[str]:
    """What still tells of removed pairs, in lines for people."""
    early = ("extract", "match", "dedup")
    held = [name for name in early if run.manifests(name)]
    if not held:
        return []
    return [f"their addresses and texts are still in the tables of {', '.join(held)}, which no"
            " later stage takes them from; their pictures are in no file"]  # fmt: skip


def _samples(run_folder: Path) -> int:
    """How many samples the packed dataset is without."""
    try:
        description = json.loads((run_folder / "pack/out/dataset.json").read_bytes())
    except FileNotFoundError:
        return 0
    return int(description["removed"]["samples"])


def _state(run_folder: Path) -> str:
    """The requests that have been carried out."""
    try:
        done = json.loads((run_folder / "removed" / "done.json").read_bytes())
    except FileNotFoundError:
        return ""
    return str(done["requests"])


@contextmanager
def _alone(run_folder: Path) -> Iterator[None]:
    """One process at a time changes files of a run; others wait."""
    while True:
        try:
            lock = RunLock(run_folder / "removed" / "lock.json", doing="removes samples")
            break
        except RunInUse:
            time.sleep(1.0)
    try:
        yield
    finally:
        lock.release()


def _keep_verdicts(run: Run, stages: Sequence[Stage], max_failed_tasks: float) -> list[Any]:
    """What `_take_over` needs, noted before anything changes: for each task of the stage its
    fingerprint, and what makes sure that it is the same task. Empty if the stage is not up to date.
    """
    path = run.folder / "removed" / "verdicts.json"
    if path.exists():  # of a process that was ended in between
        noted: list[Any] = json.loads(path.read_bytes())
        return noted
    place = next((n for n, stage in enumerate(stages) if stage.name == KEPT_VERDICTS), None)
    if place is None or not run.completed(KEPT_VERDICTS):
        return []
    fresh = Run(run.folder, run.config)
    try:
        if runner.outdated(fresh, stages[: place + 1], max_failed_tasks):
            return []
    except UserError:  # an input is gone: there is nothing to go on with
        return []
    kept = [
        [p.fingerprint, _sameness(stages[place], run, p.task)] for p in fresh.plan(KEPT_VERDICTS)
    ]
    files.write_atomic(path, json.dumps(kept))
    return kept


def _sameness(stage: Stage, run: Run, task: Any) -> str:
    """Equal for two tasks that differ in the contents of what they read alone."""
    sections = [getattr(run.config, name).identity() for name in (stage.name, *stage.also)]
    names = [Path(reference).name for reference in task.reads]
    return digest([stage.version, sections, dict(task.params), names])


def _take_over(run: Run, stage: Stage, kept: list[Any]) -> None:
    """Let the stage's results stand for the tasks that read what is left."""
    folder = run.stage_folder(stage.name)
    planned: list[Any] = []
    for phase in range(1 + len(stage.then)):
        planned += stage.planned(Run(run.folder, run.config), phase, len(planned))
        for task, (fingerprint, sameness) in zip(planned, kept, strict=False):
            if _sameness(stage, run, task.task) != sameness:
                log.warning("%s decides anew: its settings have changed meanwhile", stage.name)
                return
            before = find(folder, fingerprint)
            if before is not None and find(folder, task.fingerprint) is None:
                published.take_over(folder, before, task.fingerprint)
        run.save_plan(stage.name, planned)


def _tidy(run: Run, stage: str) -> None:
    """Delete what no task published, or what was left on the way; show what is."""
    folder = run.stage_folder(stage)
    manifests = published.everything(folder)
    for manifest in run.manifests(stage):
        published.expose(folder, manifest)
    shown: set[str] = {output.name for manifest in manifests for output in manifest.outputs}
    for path in list(files.walk(folder / "out")) if (folder / "out").exists() else []:
        if path.relative_to(folder / "out").as_posix() not in shown:
            path.unlink()
    stores = {manifest.store for manifest in manifests}
    for path in (folder / "store").iterdir() if (folder / "store").exists() else []:
        if path.name not in stores:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())
