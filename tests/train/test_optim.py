"""Which parameters decay, and the learning rate over the steps."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from tests.train.conftest import TINY_MODEL
from train import towers
from train.model import CLIP
from train.optim import learning_rate, optimizer, parameter_groups
from train.settings import ModelSettings, OptimSettings


def test_gains_biases_and_temperature_do_not_decay() -> None:
    net = CLIP(towers.description(ModelSettings.model_validate(TINY_MODEL)))
    groups = [group["params"] for group in parameter_groups(net, 0.2)]
    names = {id(p): name for name, p in net.named_parameters()}
    decayed, kept, scalars = ({names[id(p)] for p in cast(Any, group)} for group in groups)
    assert scalars == {"logit_scale"}
    assert {"visual.bn1.weight", "visual.bn1.bias", "text.ln_final.weight"} <= kept
    assert {n for n in names.values() if n.endswith("bias")} <= kept
    assert {"visual.conv1.weight", "text.token_embedding.weight"} <= decayed
    assert sorted([*decayed, *kept, *scalars]) == sorted(names.values())
    param_groups = optimizer(net, OptimSettings(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in param_groups] == [0.3, 0.0, 0.0]


def test_the_optimiser_starts_as_a_fresh_one_would() -> None:
    """Its state is there before the first step, and neither weights nor updates notice."""
    results = []
    for make in (optimizer, _plain):
        torch.manual_seed(2)
        net = torch.nn.Linear(4, 3)
        adamw = make(net, OptimSettings(weight_decay=0.3))
        assert (len(adamw.state) == 2) is (make is optimizer)
        for _ in range(2):
            net(torch.ones(2, 4)).square().sum().backward()
            for group in adamw.param_groups:
                group["lr"] = 0.1
            adamw.step()
        results.append(net.weight.detach())
    assert torch.equal(*results)


def _plain(net: torch.nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    groups = parameter_groups(net, settings.weight_decay)
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=settings.eps, fused=True)


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    settings = OptimSettings(lr=0.8, warmup_steps=4)
    rates = [learning_rate(step, 20, settings) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0.4)
    assert 0 < rates[19] < 0.01
    assert learning_rate(0, 1, OptimSettings(lr=0.8, warmup_steps=0)) == 0.8
    assert learning_rate(2, 3, OptimSettings(lr=0.8, warmup_steps=10)) == pytest.approx(0.24)
