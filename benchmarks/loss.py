"""The tiled contrastive loss against open_clip's dense one: forward and backward on the CPU.

Peak memory is that of a process of its own, above what the features took; time is taken in turns
in one process.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import compete, memory_mb, reset_peak
from train.loss import contrastive_loss

BATCH = 16_384
WIDTH = 512
TILE = 512
_ROUNDS = 2


def _features() -> list[Tensor]:
    torch.manual_seed(0)
    both = [F.normalize(torch.randn(BATCH, WIDTH), dim=-1) for _ in range(2)]
    return [value.requires_grad_() for value in (*both, torch.tensor(1 / 0.07))]


def _losses() -> dict[str, Callable[..., Tensor]]:
    from open_clip import ClipLoss

    return {"ours": partial(contrastive_loss, tile=TILE), "peer": ClipLoss()}


def _run(loss: Callable[..., Tensor], leaves: list[Tensor]) -> float:
    value = loss(*leaves)
    torch.autograd.grad(value, leaves)
    return value.item()


def _peak_mb(side: str) -> tuple[float, float]:
    """(MB above the features at the most, value)."""
    leaves, loss = _features(), _losses()[side]
    small = [leaf[:64].detach() if leaf.ndim else leaf.detach() for leaf in leaves]
    # What libraries load, they load now.
    _run(loss, [leaf.requires_grad_() for leaf in small])
    gc.collect()
    reset_peak()
    before = memory_mb("VmRSS")
    value = _run(loss, leaves)
    return memory_mb("VmHWM") - before, value


def measure() -> Iterator[dict[str, Any]]:
    """Peak memory, then pairs a second."""
    sizes = {"peer_name": "open_clip.ClipLoss", "batch": BATCH, "width": WIDTH, "tile": TILE}
    peaks = {}
    for side in ("ours", "peer"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peaks[side] = pool.submit(_peak_mb, side).result()
    (ours_mb, value), (peer_mb, expected) = peaks["ours"], peaks["peer"]
    assert abs(value / expected - 1) < 1e-5, (value, expected)
    yield {
        "name": "loss memory",
        "ours": round(ours_mb),
        "peer": round(peer_mb),
        "ratio": round(peer_mb / ours_mb, 1),
        "unit": "MB",
        **sizes,
    }
    leaves, losses = _features(), _losses()
    ours_s, peer_s = compete(
        lambda: _run(losses["ours"], leaves), lambda: _run(losses["peer"], leaves), _ROUNDS
    )
    yield {
        "name": "loss",
        "ours": round(BATCH / ours_s),
        "peer": round(BATCH / peer_s),
        "ratio": round(peer_s / ours_s, 2),
        "unit": "pairs/s",
        "threads": torch.get_num_threads(),
        **sizes,
    }
