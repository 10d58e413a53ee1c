"""The two stages of training: TRAIN reads what `pack` made, EVALUATE what TRAIN made.

Their work is imported when it is done, so that commands that train nothing never load torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pipeline.config import ConfigError
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stats import Stats
from train.settings import EvaluateSettings, TrainSettings

log = logging.getLogger(__name__)


def _plan_train(run: Run) -> list[Task]:
    settings: TrainSettings = run.settings("train")
    start = run.find(settings.init_from) if settings.init_from else []
    if settings.data.datasets:
        from train.data import datasets, mixture

        mixture.check_weights(settings.data.datasets)
        found = {
            name: datasets.listing(dataset, settings.data.read_timeout_s).identity()
            for name, dataset in settings.data.datasets.items()
        }
        return [Task("train", 0, tuple(start), {"datasets": found})]
    reads = [
        *run.find("pack:index.parquet"),
        *run.find("pack:dataset.json"),
        *run.find("pack:shards/*.tar"),
    ]
    return [Task("train", 0, (*reads, *start))]


def _train(attempt: Attempt) -> Stats:
    # Threads that wait for each other asleep leave the processor to those that decode pictures.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from train import launch

    return launch.train(attempt)


@contextmanager
def _checked(run: Run) -> Iterator[Mapping[str, str]]:
    """Say before the training's task is started what would end it, or make it last for weeks, on
    the machine that there is."""
    from train import launch

    settings: TrainSettings = run.settings("train")
    launch.processes(settings)
    here = launch.place(os.environ)
    leads = here is None or here.rank == 0
    small = settings.preset == "cpu" or settings.model.name == "custom"  # chosen for a CPU
    if leads and not small and not launch.visible_gpus():
        log.warning(
            "there is no GPU here: %s samples of %s will take a long time;"
            ' SET="train.preset=cpu" is a small recipe',
            *(f"{settings.samples:,}", settings.model.name),
        )
    yield {}


def _nodes(run: Run, processes_per_node: int) -> tuple[int, ...]:
    """The numbers of nodes to train on, as `Stage.nodes`: those that share the lanes equally."""
    settings: TrainSettings = run.settings("train")
    lanes, each = settings.data.lanes, processes_per_node
    fewest, most = settings.fewest_and_most_nodes
    if fit := tuple(n for n in range(fewest, most + 1) if not lanes % (n * each)):
        return fit
    would = [str(n) for n in range(1, lanes + 1) if not lanes % (n * each)]
    raise ConfigError(
        f"train.nodes: {fewest} nodes of {each} processes are {fewest * each} processes,"
        f" which do not divide train.data.lanes ({lanes}); "
        + (f"{', '.join(would)} nodes would do" if would else f"make those a multiple of {each}")
    )


def _follower(run: Run) -> tuple[str, ...]:
    """Evaluation of the milestones, as `Stage.follower`."""
    evaluation: EvaluateSettings | None = getattr(run.config, "evaluate", None)
    if run.settings("train").checkpoint.keep_every_steps == "never":
        return ()
    return ("evaluate-checkpoints", str(run.folder)) if evaluation and evaluation.datasets else ()


def _plan_evaluate(run: Run) -> list[Task]:
    patterns = run.settings("evaluate").datasets
    if not patterns:
        raise ConfigError(
            "evaluate.datasets: no dataset to evaluate on; add one as NAME: /path/to/its.parquet"
        )
    model = [*run.find("train:model.json"), *run.find("train:model.safetensors")]
    datasets = {name: run.find(pattern) for name, pattern in sorted(patterns.items())}
    reads = dict.fromkeys([*model, *(ref for refs in datasets.values() for ref in refs)])
    return [Task("evaluate", 0, tuple(reads), {"datasets": datasets})]


def _evaluate(attempt: Attempt) -> Stats:
    from train.evaluate.stage import evaluate

    return evaluate(attempt)


TRAIN = Stage(
    name="train",
    needs=("pack",),
    plan=_plan_train,
    work=_train,
    unit="samples",
    version=2,
    service=_checked,
    spans_nodes=True,
    nodes=_nodes,
    follower=_follower,
)
EVALUATE = Stage("evaluate", ("train",), _plan_evaluate, _evaluate, unit="images")
