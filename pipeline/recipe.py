"""The whole in one page: the configuration's sections and the stages in their order."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

import sample_web.stage
import train.stages
from dataset_build import (
    balance,
    dedup,
    download,
    extract,
    functions,
    match,
    pack,
    queries,
    screen,
)
from dataset_build.balance import BalanceSettings
from dataset_build.dedup import DedupSettings
from dataset_build.download import DownloadSettings
from dataset_build.extract import ExtractSettings
from dataset_build.lists import ListsSettings
from dataset_build.match import MatchSettings
from dataset_build.pack import PackSettings
from dataset_build.queries import QueriesSettings
from dataset_build.screen import ScreenSettings
from dataset_build.text import TextSettings
from pipeline.config import Settings, fault
from pipeline.local import LocalSettings
from pipeline.stage import Stage
from sample_web.stage import SampleWebSettings
from slurm.settings import DRIVER, SlurmSettings
from train.settings import EvaluateSettings, TrainSettings

BUILD = (
    queries.STAGE,
    extract.STAGE,
    match.STAGE,
    dedup.STAGE,
    balance.STAGE,
    download.STAGE,
    screen.STAGE,
    pack.STAGE,
)
TRAINING = (train.stages.TRAIN, train.stages.EVALUATE)


class Config(Settings):
    """A run: what it reads, how each stage works, and where it ends."""

    until: Literal[
        "queries", "extract", "match", "dedup", "balance", "download", "screen", "pack"
    ] = "pack"
    """The last stage that `build` runs."""
    max_failed_tasks: float = Field(default=0, ge=0, lt=1)
    """Share of a stage's tasks that may fail in all their attempts and be left out, below 1; for
    `extract` and `download`, where a broken archive or shard need not end a build. The report says
    what was left out; with a smaller share such tasks are tried again."""
    sample_web: SampleWebSettings | None = None
    """A made-up web to build from, made by the run itself; leave it out to use real inputs."""
    text: TextSettings = Field(default_factory=TextSettings)
    """How queries and captions are compared."""
    queries: QueriesSettings = Field(default_factory=QueriesSettings)
    """The query list and what it is assembled from."""
    extract: ExtractSettings = Field(default_factory=ExtractSettings)
    """Web archives and parquet pools, and which captions are worth keeping."""
    match: MatchSettings = Field(default_factory=MatchSettings)
    """Which queries occur in which caption."""
    dedup: DedupSettings = Field(default_factory=DedupSettings)
    """All captions of one address."""
    balance: BalanceSettings = Field(default_factory=BalanceSettings)
    """The cap on pairs a query."""
    lists: ListsSettings = Field(default_factory=ListsSettings)
    """What must not be fetched or kept."""
    download: DownloadSettings = Field(default_factory=DownloadSettings)
    """How pictures are fetched and resized."""
    screen: ScreenSettings = Field(default_factory=ScreenSettings)
    """Which pictures are kept."""
    pack: PackSettings = Field(default_factory=PackSettings)
    """The shards."""
    train: TrainSettings = Field(default_factory=TrainSettings)
    """The model and its training."""
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    """What the trained model is measured on."""
    local: LocalSettings = Field(default_factory=LocalSettings)
    """How tasks run on this machine."""
    slurm: SlurmSettings = Field(default_factory=SlurmSettings)
    """How tasks run on a SLURM cluster."""

    @model_validator(mode="after")
    def _names_stages(self) -> Config:
        known = [stage.name for stage in (sample_web.stage.STAGE, *BUILD, *TRAINING)] + [DRIVER]
        for name in self.slurm.stages:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
                raise fault(f"no stage {name!r}; {hint}", f"slurm.stages.{name}")
        return self


def names_inputs(config: Config) -> bool:
    """Whether there is anything to build from."""
    queries, extract = config.queries, config.extract
    named = [queries.wikipedia, queries.page_views, queries.wordnet, queries.file]
    named += [extract.wat, extract.warc, extract.pool]
    return config.sample_web is not None or any(named)


def fetches_anonymously(config: Config) -> bool:
    """Whether a build would ask servers of others without saying who asks."""
    names = [stage.name for stage in BUILD]
    fetches = names.index(config.until) >= names.index(download.STAGE.name)
    return fetches and config.sample_web is None and not config.download.contact


def check_functions(config: Config) -> None:
    """Raises `ConfigError` if a function that the settings name is not there: better now than when
    a stage of days has ended."""
    named = {
        "extract.language": config.extract.language,
        "download.blur": config.download.blur,
        **{
            f"screen.scores.{name}.function": s.function for name, s in config.screen.scores.items()
        },
    }
    for setting, function in named.items():
        if function:
            functions.identity(setting, function)


def build_stages(config: Config) -> Sequence[Stage]:
    """The stages of the dataset up to `config.until`."""
    names = [stage.name for stage in BUILD]
    stages = list(BUILD[: names.index(config.until) + 1])
    if config.sample_web is None:
        return stages
    served = [
        replace(s, service=sample_web.stage.serve) if s.name == "download" else s for s in stages
    ]
    return [sample_web.stage.STAGE, *served]


def all_stages(config: Config) -> Sequence[Stage]:
    """The dataset's stages, then training and evaluation where there is something to train on."""
    stages = list(build_stages(config))
    if config.until != "pack" and not config.train.data.datasets:
        return stages
    return [*stages, *TRAINING]
