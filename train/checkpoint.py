"""Checkpoints while training goes on: when, by whom, and what becomes of one that fails.

In the step, state is copied into host memory. A thread of each process then writes its share, reads
it back and hashes it; threads never communicate. Processes compare notes between steps, in the
training thread, where all of them stand at the same line: so no collective can meet another out of
order, and a failed save is seen by all at one step. When all shares are on the disk, the leading
process's thread publishes the checkpoint. One save is under way at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline import files
from pipeline.config import UserError
from pipeline.lock import RunLock
from train.checkpoint_folder import (
    Checkpoint,
    CheckpointFolder,
    Progress,
    faults,
    temporary_name,
)
from train.distributed import Process
from train.settings import CheckpointSettings
from train.training_state import Share, TrainingState, Written

__all__ = ["CheckpointDamaged", "Checkpointer", "Progress", "SaveFailed"]

log = logging.getLogger(__name__)


class SaveFailed(UserError):
    """The state of training cannot be saved."""


class CheckpointDamaged(UserError):
    """There are checkpoints, and none of them can be used."""

    exit_code = 5


@dataclass
class _Save:
    """The save under way: first every process writes, then the leading one publishes."""

    progress: Progress
    temporary: Path
    share: Share
    work: Future[Any] | None
    """What this process's thread does now."""
    publishes: bool = False
    held_up_s: float = 0.0
    """How long training stood still for it."""
    began: float = field(default_factory=time.monotonic)


class Checkpointer:
    """Saves and restores a model and its optimiser; every process of the run has one.

    Holds the run's lock between entry and exit. Except for exit, all methods are called by all
    processes at the same point of their work. `digest` names configuration and data: checkpoints of
    another one are moved out of the way, with the files `also`.
    """

    def __init__(
        self,
        folder: Path,
        digest: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: CheckpointSettings,
        process: Process,
        *also: Path,
    ) -> None:
        self._settings = settings
        self._process = process
        self._digest = digest
        self._also = also
        self._state = TrainingState(model, optimizer, process)
        self._folder = CheckpointFolder(
            folder, keep=settings.keep, keep_every_steps=settings.keep_every_steps
        )
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._lock: RunLock | None = None
        self._token = ""
        self._save: _Save | None = None
        self._published: int | None = None
        self._due = False
        self._failed_in_a_row = 0
        self._failure = ""
        self._last_began = time.monotonic()

    def __enter__(self) -> Checkpointer:
        self._token = self._process.led(self._take_lock)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for this process's thread; what not all processes have written is given up."""
        if error is None:
            self.finish()
        self._thread.shutdown(wait=True)
        if self._save is not None and not self._save.publishes and self._process.leads:
            self._folder.forget(self._save.temporary)
        if self._lock is not None:
            self._lock.release()

    def resume(self) -> Progress:
        """Load the newest whole checkpoint, the same one in all processes; `Progress()` if none.

        Damaged ones are passed over with a warning and put by. Raises `CheckpointDamaged` if there
        are checkpoints but none is whole: training never starts anew by itself then.
        """
        return self._restore(None) or Progress()

    def go_back(self, before: int) -> Progress | None:
        """Load the newest whole checkpoint of step `before` or earlier, and delete later ones.

        If there is none, the one that comes closest; None if there is none at all.
        """
        if (progress := self._restore(before)) is not None:
            self._process.led(partial(self._folder.give_up_after, progress.step))
        return progress

    def votes(self) -> tuple[bool, bool]:
        """What all processes must learn of each other before `after_step`: whether the clock says
        that a save is due, and whether a thread is still at work."""
        clock = time.monotonic() - self._last_began > 60 * self._settings.every_minutes
        return clock and self._process.leads, not self.idle

    def after_step(
        self,
        progress: Progress,
        *,
        agreed: tuple[bool, bool] | None = None,
        now: bool = False,
        worth_it: bool = True,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Save if it is time to, or if told to `now`; then return only when it is published.

        Else what takes time goes on in the background, and what is due waits until it is
        `worth_it`. `check` is called before a save, and may raise. `agreed`: of each of `votes`,
        whether it is set in any process; asked for here if not given. The rest is equal in all
        processes. Raises `SaveFailed` when more than `max_failed_saves` in a row have failed, or
        one that was asked for `now`.
        """
        step, settings = progress.step, self._settings
        clock, unfinished = agreed or self._process.any(*self.votes())
        if self._save is not None and not unfinished:
            self._advance(step)
        self._due |= clock or step % settings.every_steps == 0
        if settings.keep_every_steps != "never":
            self._due |= step % settings.keep_every_steps == 0
        if now or (self._due and worth_it):
            self._due = False
            if not self._has(step):
                check()
                self._begin(progress)
        if now:
            self.finish(step)
            if self._published != step:
                raise SaveFailed(self._failure)

    @property
    def idle(self) -> bool:
        """Whether this process has nothing to do for the save under way, if there is one."""
        return self._save is None or self._save.work is None or self._save.work.done()

    def finish(self, step: int | None = None) -> None:
        """Return when no save is under way."""
        while self._save is not None:
            if self._save.work is not None:
                wait([self._save.work])
            self._advance(step)

    def _restore(self, before: int | None) -> Progress | None:
        self.finish()
        passed: list[Path] = []
        look = partial(self._folder.find, self._digest, *self._also, before=before)
        for path, said in self._process.led(look):
            fault = said if isinstance(said, str) else self._fault(path, said)
            if fault is None:
                assert isinstance(said, Checkpoint)
                self._load(path)
                self._process.led(partial(self._tidy, passed, said.progress.step))
                self._say(logging.INFO, "going on from %s", path)
                self._published = said.progress.step
                self._due = False
                self._last_began = time.monotonic()
                return said.progress
            self._say(
                logging.WARNING, "%s: %s; going on from the checkpoint before it", path, fault
            )
            passed.append(path)
        if passed:
            raise CheckpointDamaged(
                f"{self._folder.path}: none of the {len(passed)} checkpoints is whole (the log says"
                " what is wrong with each); restore one, or move them away to start anew"
            )
        return None

    def _begin(self, progress: Progress) -> None:
        began = time.monotonic()
        if (before := self._save) is not None:
            self.finish(progress.step)
            self._say(
                logging.WARNING,
                "the checkpoint of step %d waited %.1f s for that of step %d to be written; "
                "raise train.checkpoint.every_steps, or use a faster disk",
                *(progress.step, time.monotonic() - began, before.progress.step),
            )
        self._last_began = time.monotonic()
        share = self._state.copy()
        temporary = self._folder.path / temporary_name(progress.step, self._token)
        work = self._thread.submit(share.write, temporary)
        held_up_s = time.monotonic() - began
        self._save = _Save(progress, temporary, share, work, False, held_up_s, began)

    def _advance(self, step: int | None) -> None:
        """Take the save one stage further; no process's thread is at work on it any more."""
        save = self._save
        assert save is not None
        error = save.work.exception() if save.work is not None else None
        (failed,) = self._process.any(error is not None)
        if failed:
            self._save = None
            self._give_up(save, error)
        elif not save.publishes:
            parts = self._gather(save.work.result() if save.work else None)
            save.publishes = True
            save.work = None
            if self._process.leads:
                save.work = self._thread.submit(self._publish, save, parts)
        else:
            self._save = None
            self._failed_in_a_row = 0
            self._published = save.progress.step
            self._say(
                logging.INFO,
                "checkpoint of step %d published%s: %.2f s in all, training stood still %.3f s",
                save.progress.step,
                "" if step is None else f" at step {step}",
                *(time.monotonic() - save.began, save.held_up_s),
            )

    def _publish(self, save: _Save, parts: list[Written]) -> None:
        assert self._lock is not None
        index = save.share.finish(save.temporary, parts)
        sha256 = {name: digest for part in [*parts, index] for name, digest in part.sha256.items()}
        self._lock.check()
        self._folder.publish(
            save.temporary, Checkpoint(self._digest, save.progress, self._process.world, sha256)
        )

    def _give_up(self, save: _Save, error: BaseException | None) -> None:
        """All processes know that a save failed: warn, or end training."""
        self._failed_in_a_row += 1
        reasons = [reason for reason in self._process.gather(_reason(error)) if reason is not None]
        if self._process.leads:
            self._folder.forget(save.temporary)
        fatal, reason = max(reasons)
        if fatal:
            raise SaveFailed(reason)
        stays = "none is there yet"
        if self._published is not None:
            stays = f"that of step {self._published} stays"
        self._failure = (
            f"{self._folder.path}: the checkpoint of step {save.progress.step} could not be "
            f"written: {reason}; {stays}. Make room there, or lower train.checkpoint.keep"
        )
        left = self._settings.max_failed_saves - self._failed_in_a_row
        if left < 0:
            raise SaveFailed(f"{self._failure}; {self._failed_in_a_row} in a row failed")
        self._say(logging.WARNING, "%s. %d more may fail before training ends", self._failure, left)

    def _has(self, step: int) -> bool:
        under_way = self._save.progress.step if self._save is not None else None
        return step in (under_way, self._published)

    def _fault(self, path: Path, said: Checkpoint) -> str | None:
        """What is wrong with a checkpoint's files, each of which one process reads."""
        names = sorted(said.sha256)[self._process.rank :: self._process.world]
        found = self._process.gather(faults(path, {name: said.sha256[name] for name in names}))
        return next((fault for fault in found if fault is not None), None)

    def _load(self, path: Path) -> None:
        error: BaseException | None = None
        try:
            self._state.load(path)
        except Exception as caught:
            error = caught
        (failed,) = self._process.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise SaveFailed(f"{path}: another process could not load it; its log says why")

    def _tidy(self, damaged: list[Path], step: int) -> None:
        self._folder.put_by(damaged)
        self._folder.prune(step)

    def _take_lock(self) -> str:
        self._folder.path.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(self._folder.path / "lock.json")
        return files.attempt_name()

    def _gather(self, part: Written | None) -> list[Written]:
        """The parts of all processes, in the leading one."""
        assert part is not None
        if self._process.world == 1:
            return [part]
        parts: list[Any] = [None] * self._process.world
        dist.gather_object(part, parts if self._process.leads else None)
        return parts

    def _say(self, level: int, message: str, *values: object) -> None:
        if self._process.leads:
            log.log(level, message, *values)


def _reason(error: BaseException | None) -> tuple[bool, str] | None:
    """Whether training must end, and why; the system's words where there are any."""
    if error is None:
        return None
    if isinstance(error, UserError):
        return True, str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return False, str(cause)
        cause = cause.__cause__ or cause.__context__
    return False, f"{type(error).__name__}: {error}"
