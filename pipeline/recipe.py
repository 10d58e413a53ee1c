"""The whole in one page: the configuration's sections and the stages in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field
from train.settings import EvaluateSettings, TrainSettings

from dataset_build import balance, dedup, download, extract, match, pack, queries, screen
from dataset_build.text import TextSettings
from pipeline.config import Settings
from pipeline.local import LocalSettings
from pipeline.stage import Stage
from sample_web import stage as sample_web
from train import stages as training

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


class Config(Settings):
    """A run: what it reads, how each stage works, and where it ends."""

    until: Literal[
        "queries", "extract", "match", "dedup", "balance", "download", "screen", "pack"
    ] = "pack"
    """The last stage that `build` runs."""
    sample_web: sample_web.SampleWebSettings | None = None
    """A made-up web to build from, made by the run itself; leave it out to use real inputs."""
    text: TextSettings = Field(default_factory=TextSettings)
    """How queries and captions are compared."""
    queries: queries.QueriesSettings = Field(default_factory=queries.QueriesSettings)
    """The query list and what it is assembled from."""
    extract: extract.ExtractSettings = Field(default_factory=extract.ExtractSettings)
    """Web archives and parquet pools, and which captions are worth keeping."""
    match: match.MatchSettings = Field(default_factory=match.MatchSettings)
    """Which queries occur in which caption."""
    dedup: dedup.DedupSettings = Field(default_factory=dedup.DedupSettings)
    """All captions of one address."""
    balance: balance.BalanceSettings = Field(default_factory=balance.BalanceSettings)
    """The cap on pairs a query."""
    download: download.DownloadSettings = Field(default_factory=download.DownloadSettings)
    """How pictures are fetched and resized."""
    screen: screen.ScreenSettings = Field(default_factory=screen.ScreenSettings)
    """Which pictures are kept."""
    pack: pack.PackSettings = Field(default_factory=pack.PackSettings)
    """The shards."""
    train: TrainSettings = Field(default_factory=TrainSettings)
    """The model and its training."""
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    """What the trained model is measured on."""
    local: LocalSettings = Field(default_factory=LocalSettings)
    """How tasks run on this machine."""


def build_stages(config: Config) -> Sequence[Stage]:
    """The stages of the dataset up to `config.until`."""
    names = [stage.name for stage in BUILD]
    stages = list(BUILD[: names.index(config.until) + 1])
    if config.sample_web is None:
        return stages
    served = [replace(s, service=sample_web.serve) if s.name == "download" else s for s in stages]
    return [sample_web.STAGE, *served]


def all_stages(config: Config) -> Sequence[Stage]:
    """The dataset's stages, then training and evaluation where the dataset is built to its end."""
    stages = list(build_stages(config))
    return stages if config.until != "pack" else [*stages, training.TRAIN, training.EVALUATE]
