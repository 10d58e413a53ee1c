"""Accuracy by step: the checkpoints of a training that goes on, each evaluated once.

It only reads what training writes. A checkpoint may be deleted while it is read, which costs its
point on the curve; milestones (`train.checkpoint.keep_every_steps`) stay.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader

from pipeline import files
from pipeline.config import ConfigError, MissingInput
from pipeline.manifest import digest
from pipeline.stage import Run
from pipeline.stop import StopFlag
from train import towers
from train.checkpoint_folder import MARKER, Checkpoint, faults, listed, read
from train.evaluate import zero_shot
from train.evaluate.by_step import BY_STEP, rows
from train.evaluate.stage import measure
from train.model import CLIP, SIGLIP_BIAS
from train.settings import EvaluateSettings, TrainSettings
from train.step import use_threads

log = logging.getLogger(__name__)


def evaluate_new(run: Run, stop: StopFlag) -> int:
    """Evaluate the milestones that are new, all checkpoints where there are no milestones.

    Adds a line for each to RUN/evaluate/by_step.jsonl; returns how many. Raises `ConfigError` if
    the checkpoints are of another configuration, `Stopped` between pictures if asked to stop.
    """
    settings: TrainSettings = run.settings("train")
    evaluation: EvaluateSettings = run.settings("evaluate")
    _check_configuration(run, settings)
    use_threads(evaluation.threads)
    references = {name: run.find(p) for name, p in sorted(evaluation.datasets.items())}
    datasets = {
        name: zero_shot.open_dataset(name, [run.path(ref) for ref in refs])
        for name, refs in references.items()
    }
    contents = {name: [run.identity(ref) for ref in refs] for name, refs in references.items()}
    path = run.stage_folder("evaluate") / BY_STEP
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {row["key"] for row in rows(path)}
    count = 0
    for folder, said in _milestones(run, settings):
        step = said.progress.step
        # Weights too: training that went back saves other ones at the same step.
        key = digest({"weights": dict(said.sha256), "settings": said.digest, "datasets": contents})
        if key in known:
            continue
        try:
            if fault := faults(folder, said.sha256):
                log.warning("%s: %s; it is not evaluated", folder, fault)
                continue
            net = load(folder, settings)
        except OSError:
            if folder.exists():
                raise
            log.info("the checkpoint of step %d was deleted before it was read", step)
            continue
        log.info("evaluating the checkpoint of step %d", step)
        margin = towers.image_size(_described(settings)) + settings.data.margin
        results = {
            name: scores.results()
            for name, scores in measure(net, datasets, evaluation, margin, stop)
        }
        for result in results.values():
            result.pop("per_class")
        row = {"step": step, "samples": step * settings.batch, "time": round(time.time(), 3)}
        _append(path, {**row, "key": key, "datasets": results})
        count += 1
    return count


def load(folder: Path, settings: TrainSettings) -> CLIP:
    """The model of a checkpoint, whole, in evaluation mode, on the GPU if there is one.

    However many processes wrote it, sharded or not; only their files are needed. Raises `OSError`.
    """
    net = CLIP(_described(settings))
    _load_weights(folder, net)
    return net.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _load_weights(folder: Path, net: nn.Module) -> None:
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    state = {"model": net.state_dict()}
    planner = DefaultLoadPlanner()
    planner.set_up_planner(state, metadata, True)
    saved = {name for name in metadata.state_dict_metadata if name.startswith("model.")}
    assert saved == set(planner.state_dict), saved ^ set(planner.state_dict)
    reader.set_up_storage_reader(metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    [plan] = reader.prepare_global_plan(planner.create_global_plan([plan]))
    reader.read_data(planner.finish_plan(plan), planner).wait()


def _described(settings: TrainSettings) -> dict[str, Any]:
    described = towers.description(settings.model)
    if settings.loss == "siglip":
        described = {**described, "init_logit_bias": SIGLIP_BIAS}
    return described


def _check_configuration(run: Run, settings: TrainSettings) -> None:
    path = run.stage_folder("train") / "training.json"
    try:
        trained = json.loads(path.read_text())["settings"]
    except FileNotFoundError:
        raise MissingInput(f"{path}: no training has begun in this run") from None
    if trained != json.loads(json.dumps(settings.identity())):
        raise ConfigError(
            f"{run.folder}/config.yaml: train: these are not the settings that the checkpoints were"
            " trained with; run `train` with the configuration that is to be evaluated"
        )
    if not run.settings("evaluate").datasets:
        raise ConfigError(
            "evaluate.datasets: no dataset to evaluate on; add one as NAME: /path/to/its.parquet"
        )


def _milestones(run: Run, settings: TrainSettings) -> Iterator[tuple[Path, Checkpoint]]:
    """Oldest first; those that are not whole are passed over."""
    every = settings.checkpoint.keep_every_steps
    for path, step in reversed(listed(run.stage_folder("train") / "checkpoints")):
        if every != "never" and step % every:
            continue
        said = read(path, step)
        if isinstance(said, str):
            log.info("%s: %s: %s", path, MARKER, said)
        else:
            yield path, said


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add a line and force it to the disk; what a crash left of another one is ended before it."""
    with path.open("ab+") as stream:
        size = stream.tell()
        stream.seek(max(0, size - 1))
        torn = stream.read(1) not in (b"", b"\n")
        stream.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    files.fsync(path.parent)
