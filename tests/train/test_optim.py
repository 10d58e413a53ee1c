"""Which parameters decay, and the learning rate over the steps."""

from __future__ import annotations

import pytest

from tests.train.conftest import TINY_MODEL
from train import towers
from train.model import CLIP
from train.optim import learning_rate, optimizer, parameter_groups
from train.settings import ModelSettings, OptimSettings


def test_gains_biases_and_temperature_do_not_decay() -> None:
    net = CLIP(towers.description(ModelSettings.model_validate(TINY_MODEL)))
    decayed, kept = (group["params"] for group in parameter_groups(net, 0.2))
    assert isinstance(decayed, list)
    assert isinstance(kept, list)
    names = {id(p): name for name, p in net.named_parameters()}
    kept_names = {names[id(p)] for p in kept}
    decayed_names = {names[id(p)] for p in decayed}
    assert "logit_scale" in kept_names
    assert {"visual.bn1.weight", "visual.bn1.bias", "text.ln_final.weight"} <= kept_names
    assert {n for n in names.values() if n.endswith("bias")} <= kept_names
    assert {"visual.conv1.weight", "text.token_embedding.weight"} <= decayed_names
    assert kept_names | decayed_names == set(names.values())
    assert not kept_names & decayed_names
    groups = optimizer(net, OptimSettings(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    settings = OptimSettings(lr=0.8, warmup_steps=4)
    rates = [learning_rate(step, 20, settings) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0.4)
    assert 0 < rates[19] < 0.01
    assert learning_rate(0, 1, OptimSettings(lr=0.8, warmup_steps=0)) == 0.8
    assert learning_rate(2, 3, OptimSettings(lr=0.8, warmup_steps=10)) == pytest.approx(0.24)
