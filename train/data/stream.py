"""The stream of batches that the settings and a dataset describe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.stage import Attempt
from train import towers
from train.data.datasets import open_datasets
from train.data.index import Index, read_index
from train.data.loader import Loader
from train.data.mixture import lanes_each
from train.data.order import Order
from train.data.removed import ANY
from train.data.tokenizer import Tokenizer
from train.distributed import Process
from train.settings import TrainSettings


def open_index(attempt: Attempt, process: Process) -> Index:
    """The samples of the configuration's datasets, or of the shards that this run packed."""
    if "datasets" in attempt.task.params:
        return open_datasets(attempt, process.rank, process.world)
    paths = {reference: attempt.run.path(reference) for reference in attempt.task.reads}
    named = {Path(reference.rpartition(":")[2]).name: paths[reference] for reference in paths}
    shards = {name: str(path) for name, path in named.items() if name.endswith(".tar")}
    index = read_index(named["index.parquet"], shards, named["dataset.json"])
    # What a removal writes comes in force with one rename, so it is read from where that is.
    return replace(index, removed_at=(str(attempt.run.folder / "removed" / ANY / "uids.txt"),))


def open_stream(
    index: Index, settings: TrainSettings, described: dict[str, Any], process: Process
) -> tuple[Order, Loader]:
    """The order of samples, and a loader of this process's part of every batch."""
    data = settings.data
    if said := settings.misfit(process.world):
        raise ConfigError(f"train.data.lanes: {said}")
    order = Order(
        index,
        seed=settings.seed,
        batch=settings.batch,
        lanes=data.lanes,
        block_samples=data.block_samples,
        lanes_each=lanes_each(index.parts, data, settings.batch),
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
        pinned=process.device.type == "cuda",
        max_pixels=data.max_pixels,
        max_lost=data.max_lost,
        worker_timeout_s=data.worker_timeout_s,
    )
    return order, loader
