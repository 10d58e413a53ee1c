"""AdamW as CLIP uses it, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from train.settings import OptimSettings


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weights, which decay; gains and biases, which do not; nor does the temperature.

    Gains and biases have one dimension, the temperature none: it is whole in every process, even
    where all else is sharded, and AdamW takes no group that is half the one and half the other.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim == 0], "weight_decay": 0.0},
    ]


def optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over these groups; its learning rate is set before every step.

    Its running means exist from the start, so that a checkpoint always has the same entries.
    """
    adamw = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,  # one pass over memory: the token embedding has 49408 rows
    )
    for group in adamw.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    adamw.step()  # changes no weight: both gradient and learning rate are 0
    for state in adamw.state.values():
        state["step"].zero_()
    adamw.zero_grad(set_to_none=True)
    return adamw


def learning_rate(step: int, steps: int, settings: OptimSettings) -> float:
    """Of step 0 to `steps` - 1: a linear rise over the warm-up, then half a cosine down to 0."""
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
