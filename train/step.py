"""One step of training: features, loss, gradients, update.

Torch is seeded anew before each step, so that what a step does depends on the weights, the
optimiser's state, the batch and the step's number alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from train import distributed, optim
from train.data.loader import Batch
from train.loss import contrastive_loss
from train.model import CLIP
from train.settings import TrainSettings


@dataclass(frozen=True)
class Taken:
    """What one step measured."""

    loss: float
    grad_norm: float
    lr: float
    finite: bool


class TrainStep:
    """The model, its optimiser, and what one step does to them."""

    def __init__(
        self,
        settings: TrainSettings,
        steps: int,
        described: dict[str, Any],
        process: distributed.Process,
    ) -> None:
        self.settings = settings
        self.process = process
        self._steps = steps
        torch.manual_seed(settings.seed)
        start = settings.model
        self.net = CLIP(described, start.init_temperature, start.residual_gain)
        self.net.to(process.device).train()
        self.optimizer = optim.optimizer(self.net, settings)
        self._autocast = wants_bfloat16(settings.precision, process.device)
        self._parameters = [p for p in self.net.parameters() if p.requires_grad]
        self._statistics = list(self.net.visual.buffers())
        self._forward: nn.Module = self.net
        self._is_arranged = False
        if process.world > 1:
            self._forward = nn.parallel.DistributedDataParallel(self.net)

    def features(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised features of this process's part of the batch, and the multiplier."""
        device = self.process.device
        image, tokens = batch.image.to(device), batch.tokens.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            images, texts, scale = self._forward(image, tokens)
        return images, texts, scale

    def gradients(self, step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Form the gradients of a step; its loss and their norm, which all processes find alike."""
        if self._forward is not self.net and not self._is_arranged:
            # After its first pass, data-parallel training groups the gradients anew. Groups decide
            # how sums are rounded, so that pass is made twice and the first result thrown away:
            # else the first step after a restart would round as no other does.
            self._is_arranged = True
            self.gradients(step, batch)
            self.leave_out()
        settings = self.settings
        torch.manual_seed(settings.seed << 32 | step)
        self.lr = optim.learning_rate(step, self._steps, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self._before = [buffer.clone() for buffer in self._statistics]
        self.optimizer.zero_grad(set_to_none=True)
        self.images, self.texts, scale = self.features(batch)
        loss = contrastive_loss(self.images, self.texts, scale, tile=settings.loss_tile)
        loss.backward()
        grads = [p.grad for p in self._parameters if p.grad is not None]
        return loss.detach(), nn.utils.get_total_norm(grads)

    def update(self, grad_norm: float) -> None:
        """Take the step. `grad_norm` is equal in all processes to the last bit."""
        if self.settings.clip_gradients:
            norm = torch.tensor(grad_norm, device=self.process.device)
            nn.utils.clip_grads_with_norm_(self._parameters, self.settings.max_grad_norm, norm)
        self.optimizer.step()
        self.net.clamp_temperature()

    def leave_out(self) -> None:
        """Undo what the step has left in the statistics of normalisation, and take it not."""
        for buffer, value in zip(self._statistics, self._before, strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the last step's pictures whose own text is the nearest of this process's."""
        best = (self.images @ self.texts.T).argmax(1)
        return float((best == torch.arange(len(best), device=best.device)).float().mean())


def use_threads(threads: int | Literal["all"]) -> None:
    """Compute on as many threads, or on this process's share of the processors that it may use."""
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(max(1, share) if threads == "all" else threads)


def wants_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether the towers run in bfloat16; elsewhere than in matrix units it is slower on CPUs."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    return capabilities is not None and bool(capabilities().get("amx_bf16"))
