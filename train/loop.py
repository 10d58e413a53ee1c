"""Training from the first step to the last, on one process or many.

The loop draws nothing from a random state that lives on: order and crops are functions of the step,
torch is seeded anew before each one. Weights, optimiser and the step's number are therefore the
whole state, and a run that was killed ends with the weights of one that was not.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError, UserError
from pipeline.manifest import Stats, digest
from pipeline.stage import Attempt
from pipeline.stop import Stopped
from train import checkpoint, distributed, optim, towers
from train.checkpoint import Progress
from train.data.index import Index, read_index
from train.data.loader import Batch, Loader
from train.data.order import Order
from train.loss import contrastive_loss
from train.metrics import Metrics
from train.model import CLIP, Tokenizer, save_model
from train.settings import TrainSettings

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
    use_threads(settings.threads)
    steps = -(-settings.samples // settings.batch)
    index = _index(attempt)
    described = towers.description(settings.model)
    with distributed.connected() as process, ExitStack() as stack:
        order, loader = _data(index, settings, described, process)
        run = _Run(settings, steps, described, process)
        folder = attempt.run.stage_folder("train")
        progress = _resume(run, folder, _digest(attempt), process)
        metrics = None
        if process.leads:
            metrics = stack.enter_context(Metrics(folder / "metrics.jsonl", progress.step))
        batches = stack.enter_context(closing(loader.batches(progress.step, steps)))
        window = _Window()
        saved = progress.step
        while progress.step < steps:
            asked = time.monotonic()
            batch = next(batches)
            window.waited += time.monotonic() - asked
            taken = run.step(batch)
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
                epoch = progress.step / order.steps_per_epoch
                metrics.write(_row(run, batch, taken, progress, window, epoch))
                window = _Window()
            if progress.skipped > settings.max_skipped_steps:
                raise TrainingDiverged(
                    f"step {progress.step}: {progress.skipped} losses or gradients were not finite "
                    "by now; lower train.lr or lengthen its warm-up"
                )
            attempt.progress(progress.step * settings.batch, steps * settings.batch, "samples")
            (stop,) = process.any(bool(attempt.stop))
            if (
                stop
                or progress.step == steps
                or progress.step % settings.checkpoint.every_steps == 0
            ):
                run.save(folder / "checkpoints", _digest(attempt), progress)
                saved = progress.step
            if stop and progress.step < steps:
                log.info("stopped after step %d of %d, checkpoint written", progress.step, steps)
                raise Stopped(f"at step {progress.step}")
        assert saved == steps
        if process.leads:
            save_model(attempt.folder, run.net, described, settings.data.margin)
        process.wait()
    seen = steps * settings.batch
    stats = Stats(rows_in=seen, rows_out=seen - progress.skipped * settings.batch)
    if progress.skipped:
        stats.drop("step_not_finite", progress.skipped * settings.batch)
    stats.counts.update(steps=steps, substituted=progress.substituted, dataset=len(index))
    return stats


@dataclass(frozen=True)
class _Taken:
    """What one step measured."""

    loss: float
    grad_norm: float
    lr: float
    finite: bool


class _Window:
    """What lies between two lines of the metrics."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.waited = 0.0
        """Seconds spent waiting for data."""
        self.losses: list[float] = []

    def add(self, taken: _Taken) -> None:
        self.losses.append(taken.loss)


class _Run:
    """The model, its optimiser, and what one step does to them."""

    def __init__(
        self,
        settings: TrainSettings,
        steps: int,
        described: dict[str, Any],
        process: distributed.Process,
    ) -> None:
        self.settings = settings
        self.process = process
        self._steps = steps
        torch.manual_seed(settings.seed)
        start = settings.model
        self.net = CLIP(described, start.init_temperature, start.residual_gain)
        self.net.to(process.device).train()
        self.optimizer = optim.optimizer(self.net, settings)
        self._autocast = wants_bfloat16(settings.precision, process.device)
        self._parameters = [p for p in self.net.parameters() if p.requires_grad]
        self._statistics = list(self.net.visual.buffers())
        self._forward: nn.Module = self.net
        if process.world > 1:
            self._forward = nn.parallel.DistributedDataParallel(self.net)

    def features(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised features of this process's part of the batch, and the multiplier."""
        device = self.process.device
        image, tokens = batch.image.to(device), batch.tokens.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            images, texts, scale = self._forward(image, tokens)
        return images, texts, scale

    def step(self, batch: Batch) -> _Taken:
        """One update; left out if the loss or the gradient is not finite."""
        settings = self.settings
        torch.manual_seed(settings.seed << 32 | batch.step)
        lr = optim.learning_rate(batch.step, self._steps, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        before = [buffer.clone() for buffer in self._statistics]
        self.optimizer.zero_grad(set_to_none=True)
        self.images, self.texts, scale = self.features(batch)
        loss = contrastive_loss(self.images, self.texts, scale, tile=settings.loss_tile)
        loss.backward()
        grads = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        # Loss and reduced gradients are equal in all processes, so all of them decide alike.
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if finite:
            if settings.clip_gradients:
                nn.utils.clip_grads_with_norm_(self._parameters, settings.max_grad_norm, norm)
            self.optimizer.step()
            self.net.clamp_temperature()
        else:
            log.warning("step %d is skipped: loss %g, gradient %g", batch.step, loss, norm)
            for buffer, value in zip(self._statistics, before, strict=True):
                buffer.copy_(value)
        return _Taken(loss.item(), norm.item(), lr, finite)

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the last step's pictures whose own text is the nearest of this process's."""
        best = (self.images @ self.texts.T).argmax(1)
        return float((best == torch.arange(len(best), device=best.device)).float().mean())

    def save(self, folder: Path, digest: str, progress: Progress) -> None:
        """Write a checkpoint; every process waits for it."""
        if self.process.leads:
            keep = self.settings.checkpoint.keep
            checkpoint.save(folder, digest, progress, self.net, self.optimizer, keep=keep)
        self.process.wait()


def use_threads(threads: int | Literal["all"]) -> None:
    """Compute on as many threads, or on every processor that this process may use."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if threads == "all" else threads)


def wants_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether the towers run in bfloat16; elsewhere than in matrix units it is slower on CPUs."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    return capabilities is not None and bool(capabilities().get("amx_bf16"))


def _index(attempt: Attempt) -> Index:
    paths = {reference: attempt.run.path(reference) for reference in attempt.task.reads}
    named = {Path(reference.rpartition(":")[2]).name: paths[reference] for reference in paths}
    shards = {name: path for name, path in named.items() if name.endswith(".tar")}
    return read_index(named["index.parquet"], shards, named["dataset.json"])


def _data(
    index: Index, settings: TrainSettings, described: dict[str, Any], process: distributed.Process
) -> tuple[Order, Loader]:
    data = settings.data
    if settings.batch % data.lanes or data.lanes % process.world:
        raise ConfigError(
            f"train.data.lanes: {data.lanes} must divide train.batch ({settings.batch}) and be a "
            f"multiple of the number of processes ({process.world})"
        )
    order = Order(
        index,
        seed=settings.seed,
        batch=settings.batch,
        lanes=data.lanes,
        block_samples=data.block_samples,
    )
    loader = Loader(
        index,
        order,
        Tokenizer(towers.context_length(described)),
        image_size=towers.image_size(described),
        seed=settings.seed,
        margin=data.margin,
        rank=process.rank,
        world=process.world,
        workers=data.workers,
        prefetch=data.prefetch,
        cache_bytes=data.cache_bytes,
    )
    return order, loader


def _digest(attempt: Attempt) -> str:
    """Names what the weights depend on: settings and data."""
    reads = [[ref, attempt.run.identity(ref)] for ref in attempt.task.reads]
    return digest({"settings": attempt.settings.identity(), "reads": reads})


def _resume(run: _Run, folder: Path, digest: str, process: distributed.Process) -> Progress:
    checkpoints = folder / "checkpoints"
    if process.leads:
        checkpoints.mkdir(parents=True, exist_ok=True)
        aside = checkpoint.set_aside(checkpoints, digest, folder / "metrics.jsonl")
        if aside is not None:
            log.info("checkpoints of another configuration or dataset are now in %s", aside)
    process.wait()
    found = checkpoint.latest(checkpoints, digest)
    if found is None:
        return Progress()
    progress = checkpoint.load(found, run.net, run.optimizer)
    log.info("going on from %s", found)
    return progress


def _row(
    run: _Run, batch: Batch, taken: _Taken, progress: Progress, window: _Window, epoch: float
) -> dict[str, float]:
    elapsed = max(time.monotonic() - window.began, 1e-9)
    return {
        "step": progress.step,
        "samples": progress.step * run.settings.batch,
        "epoch": epoch,
        "loss": sum(window.losses) / len(window.losses),
        "accuracy": run.accuracy(),
        "lr": taken.lr,
        "temperature": float(torch.exp(-run.net.logit_scale.detach())),
        "grad_norm": taken.grad_norm,
        "samples_per_s": len(window.losses) * run.settings.batch / elapsed,
        "data_wait": window.waited / elapsed,
        "skipped": progress.skipped,
        "substituted": progress.substituted,
    }
