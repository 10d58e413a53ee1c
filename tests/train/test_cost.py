"""What a training will cost: arithmetic over rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.plan import Ledger
from pipeline.rates import Figure, Rates
from pipeline.recipe import Config
from pipeline.stage import Run
from train import cost


def planned(train: dict[str, Any], **more: Any) -> tuple[Any, dict[str, float], Ledger]:
    run = Run(Path("nowhere"), Config.model_validate({"train": train}))
    ledger = Ledger(Rates({}, {"train.flops_per_s": Figure(1e10, "a laptop")}))
    costs, facts = cost.plan(run, ledger, pairs=400e6, pair_bytes=30e3, **more)
    return costs, facts, ledger


def test_the_published_hours_are_those_of_the_published_training() -> None:
    """12.8 billion samples on A100s, at the utilisation that is derived from just that."""
    costs, facts, ledger = planned({"preset": "ViT-B/32"}, gpu="A100", gpus=128)
    assert facts["train: samples"] == pytest.approx(12.8e9, rel=1e-4)
    assert facts["train: epochs"] == pytest.approx(32, rel=1e-3)
    assert costs.gpu_hours == pytest.approx(4600, rel=1e-3)
    assert costs.wall_s == pytest.approx(4600 * 3600 / 128, rel=1e-3)
    assert costs.core_hours == 0
    assert ledger.used["train: MFU"].source.startswith("reference, not measured by us")


def test_flops_over_the_peak_that_is_used() -> None:
    costs, facts, _ = planned({"samples": 65_536}, gpu="NVIDIA H100 80GB HBM3", mfu=0.4)
    assert facts["train: steps"] == 2
    hours = facts["train: FLOPs"] / (0.4 * 989e12) / 3600
    assert costs.gpu_hours == pytest.approx(hours)
    assert facts["train: FLOPs"] == 65_536 * facts["train: FLOPs a sample"]


def test_a_measured_rate_needs_no_data_sheet() -> None:
    costs, _, _ = planned({"samples": 65_536}, samples_per_s=100, gpus=4)
    assert costs.gpu_hours == pytest.approx(65_536 / 100 / 3600)
    assert costs.wall_s == pytest.approx(65_536 / 400)


def test_without_a_gpu_it_is_what_the_pilot_trained_on() -> None:
    costs, facts, _ = planned({"preset": "cpu"})
    assert costs.wall_s == pytest.approx(facts["train: FLOPs"] / 1e10)
    assert costs.gpu_hours == 0


def test_an_unknown_gpu_is_said() -> None:
    with pytest.raises(ConfigError, match="--gpu H900: its peak is not known"):
        planned({}, gpu="H900")
