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
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from pipeline.stage import Planned, Run, Stage

log = logging.getLogger(__name__)

KEPT_VERDICTS = redact.SCREEN
"""The stage that need not decide again: a purged dataset is the one that was built, less what was
removed. Else a cap or a duplicate that comes free would admit others, and move all shards."""
_CHANGES = ("download", KEPT_VERDICTS)
"""Stages whose outputs a removal changes."""


class RunsNow(UserError):
    """Tasks of the run are at work, so its files cannot be changed."""

    exit_code = 9


class StillThere(UserError):
    """Something that was to be removed is not."""

    exit_code = 5


def is_settled(run_folder: Path) -> bool:
    """Whether all requests have been carried out."""
    return not _new(run_folder, removed.in_force(run_folder))


def settle(run: Run, stages: Sequence[Stage], max_failed_tasks: float = 0.0) -> Mapping[str, str]:
    """Remove what requests name from `download`, if that is not done yet; gives those requests.

    Raises `RunsNow` if there is something to do and tasks of the run are at work.
    """
    requests = removed.in_force(run.folder)
    if not _new(run.folder, requests):
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
        if not (new := _new(run.folder, requests)):
            return requests  # another process has done it
        kept = _keep_verdicts(run, stages, max_failed_tasks)
        tombstones = removed.Tombstones(run.folder, requests)
        redact.captions(run, tombstones)  # before the texts are gone that it goes by
        found = redact.find(run, tombstones, _uids(run.folder, new))
        removed.also_found(run.folder, new[-1], found.uids)
        redact.outcomes(run, found)
        for stage in stages:
            if stage.name == KEPT_VERDICTS and kept:
                _take_over(run, stage, kept)
        for name in _CHANGES:
            _tidy(run, name)
        show_uids(run.folder)
        log.info("removed: %d pairs lose picture, address and text in download",
                 len(found.uids))  # fmt: skip
    return requests


def finish(run: Run, requests: Mapping[str, str]) -> None:
    """After the build: delete what no result names any more, see that nothing is left, and log it.

    `requests` are those that `settle` gave; what was asked for since is in force, and not done.
    Raises `StillThere` if files that this build does not make again hold something.
    """
    show_uids(run.folder)  # there may have been no dataset before
    if not _new(run.folder, requests):
        return
    with _alone(run.folder):
        if not (new := _new(run.folder, requests)):
            return
        for stage in (*_CHANGES, "pack"):
            if manifests := run.manifests(stage):
                published.prune(run.stage_folder(stage), manifests)
        _check_all_gone(run, requests, new)
        (run.folder / "removed" / "verdicts.json").unlink(missing_ok=True)
        record = {
            "time": round(time.time(), 3),
            "requests": new,
            "samples": _samples(run.folder),
            "fingerprint_before": removed.request(run.folder, new[0])["fingerprint"],
            "fingerprint": removed.fingerprint(run.folder),
        }
        _append(run.folder / "removed" / "log.jsonl", json.dumps(record) + "\n")
        done = {"carried_out": {**removed.carried_out(run.folder), **requests}}
        files.write_atomic(run.folder / "removed" / removed.DONE, json.dumps(done, indent=1))


def _new(run_folder: Path, requests: Mapping[str, str]) -> list[str]:
    """The numbers of those requests that were not carried out yet."""
    done = removed.carried_out(run_folder)
    return [name for name, digest in requests.items() if done.get(name) != digest]


def _uids(run_folder: Path, requests: Collection[str] | None) -> list[bytes]:
    return [bytes.fromhex(uid) for uid in removed.uids(run_folder, requests)]


def _check_all_gone(run: Run, requests: Collection[str], new: Collection[str]) -> None:
    tombstones = removed.Tombstones(run.folder, requests)
    found = redact.find(run, tombstones, _uids(run.folder, new))
    rows, members = len(found.uids), redact.left(run, found)
    samples = packed(run, requests)
    if rows or members or samples:
        raise StillThere(
            f"{run.folder}: {rows} rows of download, {members} files in its tars and {samples}"
            " samples of pack are of removed pairs still; call `make build-dataset` with a"
            " configuration that ends at pack, and no other build at the same time"
        )


def packed(run: Run, requests: Collection[str] | None = None) -> int:
    """How many pairs that requests have removed, or all of them, are in an index of pack."""
    uids = pa.array(_uids(run.folder, requests), pa.binary(16))
    folder = run.stage_folder("pack")
    found: set[bytes] = set()
    for manifest in published.everything(folder):
        for output in manifest.outputs:
            if output.name.startswith("index"):
                path = folder / "store" / manifest.store / output.name
                column = pq.read_table(path, columns=["uid"])["uid"]
                found.update(column.filter(pc.is_in(column, value_set=uids)).to_pylist())
    return len(found)


def show_uids(run_folder: Path) -> None:
    """`removed.txt` beside the packed dataset: for those who train on it from other runs, or copy
    it to elsewhere."""
    out = run_folder / "pack" / "out"
    if out.exists() and (uids := removed.uids(run_folder)):
        text = "".join(f"{uid}\n" for uid in uids)
        if not (path := out / published.REMOVED).exists() or path.read_text() != text:
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
        [p.fingerprint, _sameness(stages[place], fresh, p.task)] for p in fresh.plan(KEPT_VERDICTS)
    ]
    files.write_atomic(path, json.dumps(kept))
    return kept


def _sameness(stage: Stage, run: Run, task: Any) -> str:
    """Equal for two tasks that differ at most in what a removal changes of what they read."""
    sections = [getattr(run.config, name).identity() for name in (stage.name, *stage.also)]
    reads = [
        [Path(name).name, "" if name.partition(":")[0] in _CHANGES else run.identity(name)]
        for name in task.reads
    ]
    return digest([stage.version, sections, dict(task.params), reads])


def _take_over(run: Run, stage: Stage, kept: list[Any]) -> None:
    """Let the stage's results stand for the tasks that read what is left: all of them, or none."""
    folder = run.stage_folder(stage.name)
    fresh = Run(run.folder, run.config)
    planned: list[Planned] = []
    try:
        for phase in range(1 + len(stage.then)):
            planned += stage.planned(fresh, phase, len(planned))
            same = [before for _, before in kept[: len(planned)]]
            if [_sameness(stage, fresh, p.task) for p in planned] != same:
                log.info("%s decides anew: what it reads has changed meanwhile", stage.name)
                return
            # The next phase reads what the tasks before it have published, under either name.
            known = zip(planned, kept, strict=False)
            fresh.consider(
                stage.name,
                [p if find(folder, p.fingerprint) else replace(p, fingerprint=before)
                 for p, (before, _) in known],
            )  # fmt: skip
    except UserError as error:  # it will be said again where it is to be mended
        log.info("%s decides anew: %s", stage.name, error)
        return
    if len(planned) != len(kept):
        return
    for task, (fingerprint, _) in zip(planned, kept, strict=True):
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
    """Whole lines only, whatever a full disk or a crash did before."""
    before = path.read_text("utf-8") if path.exists() else ""
    files.write_atomic(path, before[: before.rfind("\n") + 1] + line)
