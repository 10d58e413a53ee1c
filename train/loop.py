"""Training from the first step to the last, on one process or many.

The loop draws nothing from a random state that lives on: order and crops are functions of the step,
torch is seeded anew before each one. Weights, optimiser and the step's number are therefore the
whole state, and a run that was killed ends with the weights of one that was not.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, closing
from pathlib import Path

from pipeline import files
from pipeline.config import UserError
from pipeline.manifest import Stats, digest
from pipeline.stage import Attempt
from pipeline.stop import Stopped
from train import distributed, initial_weights, page, towers, trackers
from train.checkpoint import Checkpointer, Progress
from train.data.index import Index
from train.data.stream import open_index, open_stream
from train.metrics import Metrics, Window, describe, row
from train.model import save_model
from train.settings import TrainSettings
from train.step import TrainStep, use_threads

log = logging.getLogger(__name__)


class TrainingDiverged(UserError):
    """Too many steps had a loss or gradient that was not finite."""

    exit_code = 5


def train(attempt: Attempt) -> Stats:
    """Train as `attempt.settings` say and leave `model.json` and `model.safetensors`.

    Live state is in RUN/train: `checkpoints/` and `metrics.jsonl`. Raises `Stopped` once a stop was
    asked for and a checkpoint is written.
    """
    settings: TrainSettings = attempt.settings
    trackers.check(settings.trackers)
    use_threads(settings.threads)
    steps = -(-settings.samples // settings.batch)
    described = towers.description(settings.model)
    with distributed.connected() as process, ExitStack() as stack:
        index = open_index(attempt, process)
        identity = _identity(attempt, index)
        order, loader = open_stream(index, settings, described, process)
        step = TrainStep(settings, steps, described, process)
        folder = attempt.run.stage_folder("train")
        saving = stack.enter_context(
            Checkpointer(
                *(folder / "checkpoints", identity, step.net, step.optimizer),
                *(settings.checkpoint, process, folder / "metrics.jsonl"),
            )
        )
        progress = saving.resume()
        if settings.init_from and not progress.step:
            initial_weights.load(Path(settings.init_from).expanduser(), step.net)
        training = {
            "settings": settings.identity(),
            "dataset": index.fingerprint,
            "pairs": len(index),
            "seen": steps * settings.batch,
        }
        metrics = None
        if process.leads:
            describe(folder, step, training)
            stack.callback(page.write, folder)
            mirrors = trackers.Mirrors(settings.trackers, folder, identity, training)
            stack.enter_context(mirrors)
            path = folder / "metrics.jsonl"
            metrics = stack.enter_context(Metrics(path, progress.step, mirrors))
        batches = stack.enter_context(closing(loader.batches(progress.step, steps)))
        window = Window()
        while progress.step < steps:
            asked = time.monotonic()
            batch = next(batches)
            window.waited += time.monotonic() - asked
            taken = step(batch)
            (substituted,) = process.sum(batch.substituted)
            progress = Progress(
                batch.step + 1,
                progress.skipped + (not taken.finite),
                progress.substituted + int(substituted),
            )
            window.add(taken)
            if metrics and (
                progress.step % settings.log_every_steps == 0 or progress.step == steps
            ):
                epoch = order.epochs(progress.step)
                metrics.write(row(step, taken, progress, window, epoch))
                window = Window()
            if progress.skipped > settings.max_skipped_steps:
                raise TrainingDiverged(
                    f"step {progress.step}: {progress.skipped} losses or gradients were not finite "
                    "by now; lower train.lr or lengthen its warm-up"
                )
            done, total = progress.step * settings.batch, steps * settings.batch
            attempt.progress(done, total, "samples", metrics.note if metrics else "")
            (stop,) = process.any(bool(attempt.stop))
            saving.after_step(progress, now=stop or progress.step == steps)
            if stop and progress.step < steps:
                log.info("stopped after step %d of %d, checkpoint written", progress.step, steps)
                raise Stopped(f"at step {progress.step}")
        net = step.whole_net()
        if process.leads:
            save_model(attempt.folder, net, described, settings.data.margin, training)
        process.wait()
    seen = steps * settings.batch
    stats = Stats(rows_in=seen, rows_out=seen - progress.skipped * settings.batch)
    if progress.skipped:
        stats.drop("step_not_finite", progress.skipped * settings.batch)
    stats.counts.update(steps=steps, substituted=progress.substituted, dataset=len(index))
    return stats


def _identity(attempt: Attempt, index: Index) -> str:
    """Names what the weights depend on: settings, data, and the weights at the start."""
    settings: TrainSettings = attempt.settings
    start = None
    if settings.init_from:
        start = files.sha256(Path(settings.init_from).expanduser())
    return digest({"settings": settings.identity(), "data": index.fingerprint, "start": start})
