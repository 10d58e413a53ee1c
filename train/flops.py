"""Arithmetic that training takes, counted from the model itself: what its utilisation is out of."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from train import towers
from train.model import CLIP


def forward_flops(model: dict[str, Any]) -> int:
    """Floating-point operations of both towers for one pair; a multiply-add is two.

    Of matrix products, convolutions and attention; all else is a few per cent and not counted.
    """
    with torch.device("meta"):
        net = CLIP(model)
        side = towers.image_size(model)
        image = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        tokens = torch.zeros(1, towers.context_length(model), dtype=torch.int64)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(image, tokens)
    return int(counter.get_total_flops())


def training_flops(model: dict[str, Any]) -> int:
    """Of one pair's part in a step: every product is two more on the way back."""
    return 3 * forward_flops(model)
