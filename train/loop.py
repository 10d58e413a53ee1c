"""Training from the first step to the last, on one process or many.

The loop draws nothing from a random state that lives on: order and crops are functions of the step,
torch is seeded anew before each one. Weights, optimiser, the step's number and the guard's memory
are therefore the whole state, and a run that was killed ends with the weights of one that was not.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline import files
from pipeline.manifest import digest
from pipeline.stage import Attempt
from pipeline.stats import Stats
from pipeline.stop import Stopped
from train import distributed, initial_weights, page, replicas, towers, trackers
from train.checkpoint import Checkpointer, Progress
from train.data.index import Index
from train.data.loader import Batch
from train.data.stream import open_index, open_stream
from train.distributed import Process
from train.guard import Guard, Incident, Memory, TrainingDiverged
from train.metrics import Metrics, Window, describe, row
from train.model import save_model
from train.settings import TrainSettings
from train.step import Taken, TrainStep, use_threads
from train.watchdog import Heart, Phase

log = logging.getLogger(__name__)


def train(attempt: Attempt, heart: Heart | None = None) -> Stats:
    """Train as `attempt.settings` say and leave `model.json` and `model.safetensors`.

    Live state is in RUN/train: `checkpoints/`, `metrics.jsonl`, `incidents.jsonl`. `heart` tells a
    process that watches this one how it goes; without, the processes watch each other. Raises
    `Stopped` once a stop was asked for and a checkpoint is written.
    """
    settings: TrainSettings = attempt.settings
    trackers.check(settings.trackers)
    use_threads(settings.threads)
    with distributed.connected() as process, ExitStack() as stack:
        if heart is None:
            folder = attempt.run.stage_folder("train") / "heartbeats"
            heart = stack.enter_context(Heart(folder, process.rank, settings.hang_timeout_s))
            process.wait()
            heart.watch(process.world)
        training = stack.enter_context(_Training(attempt, process, heart))
        progress = training.resume()
        while progress.step < training.steps:
            progress = training.run(progress)
        training.publish(progress)
    seen = training.steps * settings.batch
    stats = Stats(rows_in=seen, rows_out=seen - progress.skipped * settings.batch)
    if progress.skipped:
        stats.drop("step_not_finite", progress.skipped * settings.batch)
    stats.counts.update(steps=training.steps, substituted=progress.substituted)
    stats.counts.update(dataset=len(training.index))
    if rewinds := len(Memory.from_json(progress.guard).detours):
        stats.counts.update(rewinds=rewinds)
    return stats


class _Training:
    """One process's part of an attempt, with all that is built once."""

    def __init__(self, attempt: Attempt, process: Process, heart: Heart) -> None:
        self.attempt = attempt
        self.settings: TrainSettings = attempt.settings
        self.process = process
        self.heart = heart
        self.folder = attempt.run.stage_folder("train")
        self.steps = -(-self.settings.samples // self.settings.batch)
        self.index = open_index(attempt, process)
        self.described = towers.description(self.settings.model)
        self.order, self.loader = open_stream(self.index, self.settings, self.described, process)
        self.step = TrainStep(self.settings, self.steps, self.described, process)
        self.guard = Guard(self.settings)
        identity = _identity(self.settings, self.index)
        self.summary = {
            "settings": self.settings.identity(),
            "dataset": self.index.fingerprint,
            "pairs": len(self.index),
            "seen": self.steps * self.settings.batch,
        }
        self.checkpoints = Checkpointer(
            *(self.folder / "checkpoints", identity, self.step.net, self.step.optimizer),
            *(self.settings.checkpoint, process, self.folder / "metrics.jsonl"),
        )
        names = self.settings.trackers if process.leads else []
        self.mirrors = trackers.Mirrors(names, self.folder, identity, self.summary)
        self.compares_replicas = replicas.can_be_compared(self.step.net, process)
        if process.world > 1 and process.leads and not self.compares_replicas:
            log.info("the model is sharded, no process has a replica: weights are not compared")
        self._stack = ExitStack()

    def __enter__(self) -> _Training:
        with ExitStack() as stack:
            stack.enter_context(self.checkpoints)
            if self.process.leads:
                describe(self.folder, self.step, self.summary)
                stack.callback(page.write, self.folder)
            stack.enter_context(self.mirrors)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def resume(self) -> Progress:
        """Go on from the newest checkpoint of this configuration, if there is one."""
        progress = self.checkpoints.resume()
        if self.settings.init_from and not progress.step:
            initial_weights.load(Path(self.settings.init_from).expanduser(), self.step.net)
        self._say(progress, "first step")  # which may take minutes, without a sign of life
        return progress

    def run(self, progress: Progress) -> Progress:
        """Train from here to the end, or to where a rewind leads back; the progress then."""
        memory = Memory.from_json(progress.guard)
        with ExitStack() as stack:
            metrics = None
            if self.process.leads:
                path = self.folder / "metrics.jsonl"
                metrics = stack.enter_context(Metrics(path, progress.step, self.mirrors))
            detour = memory.data_step(progress.step) - progress.step
            stream = self.loader.batches(progress.step + detour, self.steps + detour)
            batches = stack.enter_context(closing(stream))
            window = Window()
            while (step := progress.step) < self.steps:
                self.heart.enter(Phase.DATA, step)
                asked = time.monotonic()
                batch = next(batches)
                window.waited += time.monotonic() - asked

                self.heart.enter(Phase.COMPUTE, step)
                figures = self.step.gradients(step, batch)

                # The one place where processes agree: what they learn here, they learn alike.
                self.heart.enter(Phase.REDUCE, step)
                stop, clock, writing, substituted, damaged, loss, grad_norm, *by_direction = (
                    self.process.sum(
                        bool(self.attempt.stop),
                        *self.checkpoints.votes(),
                        batch.substituted,
                        len(batch.damaged),
                        *(figures / self.process.world),
                    )
                )
                if damaged:
                    self._share(batch)
                verdict = self.guard.judge(memory, step, loss, grad_norm)
                memory = verdict.memory
                if verdict.skip:
                    self.step.leave_out()
                else:
                    self.step.update(grad_norm)
                if verdict.incident:
                    self._record(verdict.incident, memory)
                if verdict.back_before is not None:
                    return self._go_back(memory, verdict.back_before, step)

                progress = Progress(
                    step + 1,
                    progress.skipped + verdict.skip,
                    progress.substituted + int(substituted),
                    memory.to_json(),
                )
                taken = Taken(loss, grad_norm, self.step.lr, not verdict.skip, *by_direction)
                window.add(taken)
                ends = progress.step == self.steps
                if metrics and (ends or progress.step % self.settings.log_every_steps == 0):
                    epoch = self.order.epochs(progress.step + detour)
                    lost = len(self.loader.lost.uids)
                    metrics.write(row(self.step, taken, progress, window, epoch, lost))
                    window = Window()
                if metrics:
                    self._say(progress, metrics.note)

                if progress.step % self.settings.check_replicas_every == 0:
                    self._compare_replicas(step)
                self.checkpoints.after_step(
                    progress,
                    agreed=(clock > 0, writing > 0),
                    now=stop > 0 or ends,
                    worth_it=memory.calm,
                    check=partial(self._before_save, step),
                )
                if stop and not ends:
                    log.info("stopped after step %d of %d", progress.step, self.steps)
                    raise Stopped(f"{self.attempt.stop.name} at step {progress.step}")
        return progress

    def publish(self, progress: Progress) -> None:
        """Write the model; every process waits for it."""
        self.heart.enter(Phase.SAVE, progress.step)
        net = self.step.whole_net()
        folder = self.attempt.folder
        if self.process.leads:
            save_model(folder, net, self.described, self.settings.data.margin, self.summary)
        source = self.process.led(lambda: folder)
        if source != folder:  # under torchrun and srun each process has an attempt of its own
            for path in files.walk(source):
                shutil.copyfile(path, folder / path.name)
        self.heart.enter(Phase.WAIT, progress.step)
        self.process.wait()

    def _say(self, progress: Progress, note: str) -> None:
        if self.process.leads:
            done, total = (n * self.settings.batch for n in (progress.step, self.steps))
            self.attempt.progress(done, total, "samples", note)

    def _go_back(self, memory: Memory, before: int, step: int) -> Progress:
        """Load the last checkpoint before the trouble, and pass by the data from there to here."""
        self.heart.enter(Phase.SAVE, step)
        progress = self.checkpoints.go_back(before)
        if progress is None:
            raise TrainingDiverged(
                f"step {step}: the loss or its gradient went wrong before the first checkpoint; "
                "lower train.lr or lengthen train.warmup_steps"
            )
        saved = Memory.from_json(progress.guard)
        went_on = self.guard.detour(saved, memory, progress.step, step)
        log.warning(
            "went back from step %d to step %d, and on with later data", step, progress.step
        )
        self._write_incident({"what": "rewind", "step": step, "to_step": progress.step})
        return replace(progress, guard=went_on.to_json())

    def _before_save(self, step: int) -> None:
        self.heart.enter(Phase.SAVE, step)
        self._compare_replicas(step)

    def _compare_replicas(self, step: int) -> None:
        if not self.compares_replicas:
            return
        try:
            replicas.compare(self.step.net, self.step.optimizer, self.process, step)
        except replicas.ReplicasDiffer as error:
            self._write_incident({"what": "replicas", "step": step, "error": str(error)})
            raise

    def _share(self, batch: Batch) -> None:
        """Let every process know the samples that any of them could not use."""
        met = [uid for uids in self.process.gather(batch.damaged) for uid in uids]
        self.loader.lost.add((uid, "another process met it") for uid in met)

    def _record(self, incident: Incident, memory: Memory) -> None:
        """Log an incident, and keep the identifiers of its batch, as the order has them."""
        text = "step %d: %s, loss %g, gradient %g"
        log.warning(text, incident.step, incident.what, incident.loss, incident.grad_norm)
        data_step = memory.data_step(incident.step)
        uids = [self.index.name(place.sample) for place in self.order.batch_of(data_step)]
        self._write_incident({**asdict(incident), "data_step": data_step, "uids": uids})

    def _write_incident(self, values: dict[str, Any]) -> None:
        if self.process.leads:
            with (self.folder / "incidents.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")


def _identity(settings: TrainSettings, index: Index) -> str:
    """Names what the weights depend on: settings, data, and the weights at the start."""
    start = settings.init_from and files.sha256(Path(settings.init_from).expanduser())
    return digest({"settings": settings.identity(), "data": index.fingerprint, "start": start})
