"""Supervised processes that make parts of batches in shared memory.

Each has its lanes and answers requests for steps. It has no state to lose: one that dies or falls
silent is killed, replaced and asked again. A worker imports no torch, starts in half a second, and
is made new by exec, so it inherits neither locks nor a GPU.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType

import numpy as np

from pipeline.config import UserError
from pipeline.local import die_with_parent
from pipeline.stop import shielded
from train.data.parts import Made, Maker, Recipe
from train.data.slots import Layout, Slots, receive, share

log = logging.getLogger(__name__)

_POLL_S = 0.5
_ATTEMPTS = 3  # at one part, before the run ends
_START_S = 60  # to start may take a busy machine longer than a part
_REAP_S = 10  # a killed process may hang in the kernel, on a file system that does not answer
_OOM_SCORE = 500  # proc_pid_oom_score_adj(5): rather a worker, which is replaced, than the trainer
_STARTED = "started"


class WorkerFailed(UserError):
    """A part of a batch that no worker could make."""

    exit_code = 7


@dataclass
class _Worker:
    number: int
    process: subprocess.Popen[bytes]
    connection: Connection
    asked: deque[tuple[int, int]] = field(default_factory=deque)
    """(step, slot) of the requests without an answer, oldest first."""
    failures: int = 0
    """At the oldest of them."""
    started: bool = False
    silent_s: float = 0.0
    """How long it was waited for since it was last heard."""

    def limit_s(self, timeout_s: float) -> float:
        """How long it may be silent."""
        return timeout_s if self.started else max(timeout_s, _START_S)


class Workers:
    """Processes, at most one a lane, that together make this process's part of every batch.

    They end when the thread that made them does, when `close` is called, or at once with the
    process. A worker holds about 60 MB, one block of each of its lanes, and its share of
    `cache_bytes`. `timeout_s`: how long to wait for a worker's next sign of life.
    """

    def __init__(
        self,
        recipe: Recipe,
        lanes: Sequence[int],
        layout: Layout,
        *,
        count: int,
        timeout_s: float,
        cache_bytes: int = 0,
    ) -> None:
        self.recipe = recipe
        self.slots = Slots(layout, os.memfd_create("openwit-batches"))
        self._timeout_s = timeout_s
        self._recipe_file, self._spans = share(recipe)
        self._made: dict[int, dict[int, Made | Exception]] = {}  # step -> worker -> answer
        self._positions = [range(n, len(lanes), count) for n in range(min(count, len(lanes)))]
        self._lanes = lanes
        self._cache_bytes = cache_bytes // len(self._positions)
        self._workers = [self._start(n) for n in range(len(self._positions))]

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill all of them; slots that are in use stay so until nobody refers to them."""
        for worker in self._workers:
            _kill(worker)
        os.close(self._recipe_file)
        os.close(self.slots.descriptor)

    def ask(self, step: int, slot: int) -> None:
        """Have a step's part made in a slot; the answers come in the order of the requests."""
        self._made[step] = {}
        for worker in self._workers:
            worker.asked.append((step, slot))
            self._send(worker, step, slot)

    def take(self, step: int) -> list[Made]:
        """Wait until a step's part is in its slot; what each worker says about its share.

        Raises what a worker raised, or `WorkerFailed` if several died or fell silent over it.
        """
        while len(made := self._made[step]) < len(self._workers):
            began = time.monotonic()
            late = [worker for worker in self._workers if worker.number not in made]
            ready = wait([worker.connection for worker in late], _POLL_S)
            # The clock also runs while this process is stopped or its machine asleep.
            waited_s = min(time.monotonic() - began, 2 * _POLL_S)
            for worker in late:
                if worker.connection in ready:
                    self._receive(worker)
                    continue
                worker.silent_s += waited_s
                if worker.silent_s >= (limit_s := worker.limit_s(self._timeout_s)):
                    self._replace(worker, f"gave no sign of life for {limit_s:g} s")
        answers = self._made.pop(step)
        for answer in answers.values():
            if isinstance(answer, Exception):
                raise answer
        return [answer for answer in answers.values() if isinstance(answer, Made)]

    def _receive(self, worker: _Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(worker, "")
            return
        worker.silent_s = 0.0
        if message == _STARTED:
            worker.started = True
            return
        step, answer = message
        assert step == worker.asked.popleft()[0]
        worker.failures = 0
        self._made[step][worker.number] = answer

    def _replace(self, worker: _Worker, reason: str) -> None:
        code = _kill(worker)
        if not reason:
            reason = f"ended with exit code {code}"
            if code is not None and code < 0:
                reason = f"was killed by {signal.Signals(-code).name}"
        step, slot = worker.asked[0]
        failures = worker.failures + 1
        told = f"loader worker {worker.number} {reason} at step {step}{self._tried(worker, slot)}"
        if failures == _ATTEMPTS:
            raise WorkerFailed(
                f"{told}, as did {failures - 1} before it; if memory ran out, lower "
                "train.data.workers or train.data.block_samples; if storage is slow, raise "
                "train.data.worker_timeout_s; train.data.workers=0 decodes in the training process"
            )
        log.warning("%s; it is replaced", told)
        fresh = self._start(worker.number)
        fresh.asked, fresh.failures = worker.asked, failures
        self._workers[worker.number] = fresh
        for request in fresh.asked:
            self._send(fresh, *request)

    def _send(self, worker: _Worker, step: int, slot: int) -> None:
        # A slot is used again and again: -1 where this worker has not written.
        self._rows(worker, slot)[:] = -1
        try:
            worker.connection.send((step, slot))
        except OSError:
            pass  # it is dead, which `take` finds

    def _rows(self, worker: _Worker, slot: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        rows = self.slots.layout.slot(self.slots.memory(slot)).rows.reshape(len(self._lanes), -1)
        return rows[worker.number :: len(self._positions)]

    def _tried(self, worker: _Worker, slot: int) -> str:
        """The sample that a worker was at."""
        rows = self._rows(worker, slot)
        if not (tried := rows[rows >= 0]).size:
            return ""
        index = self.recipe.index
        row = int(tried[-1])
        return f", sample {index.name(row)} of {index.shards[int(index.shard[row])]}"

    def _start(self, number: int) -> _Worker:
        ours, theirs = Pipe()
        descriptors = (theirs.fileno(), self._recipe_file, self.slots.descriptor)
        with shielded():
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, *map(str, descriptors)],
                cwd=Path(__file__).parent.parent.parent,
                env={**os.environ, "OPENWIT_PARENT": str(os.getpid())},
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
            )
        theirs.close()
        positions = self._positions[number]
        lanes = [self._lanes[position] for position in positions]
        share = self.recipe.order.share
        first = [position * share for position in positions]
        # Little enough for the socket's buffer: a process that never reads must not hang this one.
        job = (self._spans, self.slots.layout, lanes, first, self._cache_bytes)
        try:
            ours.send(job)
        except OSError:
            pass  # it died at once, which `take` finds
        return _Worker(number, process, ours)


def _kill(worker: _Worker) -> int | None:
    """The exit code of a worker that now is gone; None if the kernel does not let go of it."""
    worker.connection.close()
    # Whoever is dead already ended of something else, which its exit code tells.
    worker.process.kill()
    try:
        return worker.process.wait(_REAP_S)
    except subprocess.TimeoutExpired:
        return None


def _work(connection: Connection, recipe_file: int, batches_file: int) -> None:
    """Answer requests until the other end is gone."""
    spans, layout, lanes, first, cache_bytes = connection.recv()
    recipe = receive(recipe_file, spans)
    assert isinstance(recipe, Recipe)
    maker = Maker(recipe, cache_bytes)
    slots = Slots(layout, batches_file)
    connection.send(_STARTED)
    while True:
        step, number = connection.recv()
        answer: Made | Exception
        try:
            answer = maker.fill(step, lanes, first, layout.slot(slots.memory(number)))
        except UserError as error:
            answer = error
        except Exception:
            answer = RuntimeError(f"in a loader worker:\n{traceback.format_exc()}")
        connection.send((step, answer))


def main(arguments: Sequence[str]) -> None:
    """A worker's life. `arguments`: descriptors of its connection, the recipe and the batches."""
    die_with_parent()
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    except OSError:
        pass  # not Linux, or forbidden: then the largest process goes
    connection, recipe_file, batches_file = map(int, arguments)
    try:
        _work(Connection(connection), recipe_file, batches_file)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the trainer is gone or wants no more


if __name__ == "__main__":
    main(sys.argv[1:])
