"""How long training stands still for a checkpoint, against `torch.save` of the same state.

The peer is what most trainers do: it neither forces the file to the disk nor reads it back.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from train.checkpoint import Checkpointer, Progress
from train.distributed import Process
from train.settings import CheckpointSettings

WIDTH, DEPTH = 1024, 24  # 24 x 1024 x 1025 = 25.2e6 parameters, 101 MB; with AdamW's means 302 MB
ROUNDS = 5


def measure() -> Iterator[dict[str, Any]]:
    """Seconds of standing still, of the whole save, and of a step beside it and without it."""
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = torch.randn(32, WIDTH)

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        return time.perf_counter() - began

    stood_still, whole, peer, quiet, beside = [], [], [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        settings = CheckpointSettings(max_lost_steps=2)
        process = Process(0, 1, torch.device("cpu"))
        folder = Path(scratch)
        with Checkpointer(folder, "", model, optimizer, settings, process) as saving:
            for number in range(ROUNDS + 1):
                quiet += [step() for _ in range(3)]
                began = time.perf_counter()
                saving.after_step(Progress(number + 1))
                stood_still.append(time.perf_counter() - began)
                while not saving.idle:
                    beside.append(step())
                saving.finish()
                whole.append(time.perf_counter() - began)
                began = time.perf_counter()
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, folder / "peer.pt")
                peer.append(time.perf_counter() - began)
    compared = {
        "stands_still": (stood_still[1:], peer[1:]),  # the first copy also allocates its memory
        "whole_save": (whole[1:], peer[1:]),
        "step_beside_save": (beside, quiet),
    }
    parameters = sum(p.numel() for p in model.parameters())
    for name, (ours, other) in compared.items():
        yield {
            "name": f"checkpoint_{name}",
            "ours": round(median(ours), 3),
            "peer": round(median(other), 3),
            "ratio": round(median(other) / median(ours), 2),
            "unit": "s",
            "parameters": parameters,
        }
