"""One step of training: features, loss, gradients, update.

Torch is seeded anew before each step, so that what a step does depends on the weights, the
optimiser's state, the batch and the step's number alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict as sharded

from pipeline.config import ConfigError
from pipeline.stop import shielded
from train import distributed, flops, grad_cache, optim, parallel
from train.data.loader import Batch
from train.grad_cache import Objective
from train.loss import PairBias, contrast, sigmoid_loss
from train.model import CLIP, SIGLIP_BIAS
from train.settings import TrainSettings

INIT_TEMPERATURE = {"contrastive": 0.07, "siglip": 0.1}


@dataclass(frozen=True)
class Taken:
    """What one step measured, over the batch of all processes."""

    loss: float
    grad_norm: float
    lr: float
    finite: bool
    loss_image_to_text: float
    loss_text_to_image: float
    accuracy_image_to_text: float
    """Share of the batch's pictures whose own text is nearer than all others of the batch."""
    accuracy_text_to_image: float
    """Share of its texts whose own picture is."""


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
        self.pair_bias: Callable[[Batch], PairBias] | None = None
        """Weighs the pairs of a batch against each other, under the contrastive loss."""
        self._steps = steps
        self._model = dict(described)
        if settings.loss == "siglip":
            self._model["init_logit_bias"] = SIGLIP_BIAS
        torch.manual_seed(settings.seed)
        start = settings.model
        temperature = start.init_temperature or INIT_TEMPERATURE[settings.loss]
        self.net = CLIP(self._model, temperature, start.residual_gain)
        self.net.to(process.device).train()
        bfloat16 = wants_bfloat16(settings.precision, process.device)
        self._towers = parallel.place(self.net, settings, process, bfloat16=bfloat16)
        self.optimizer = optim.optimizer(self.net, settings)
        self._parameters = [p for p in self.net.parameters() if p.requires_grad]
        self._statistics = list(self.net.visual.buffers())

    def __call__(self, batch: Batch) -> Taken:
        """A step by itself, left out if loss or gradient are not finite.

        The training loop does the same with a guard's judgement between its parts.
        """
        loss, grad_norm, *by_direction = self.gradients(batch.step, batch).tolist()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            self.update(grad_norm)
        else:
            self.leave_out()
        return Taken(loss, grad_norm, self.lr, finite, *by_direction)

    @shielded()  # torch.compile starts compilers
    def gradients(self, step: int, batch: Batch) -> Tensor:
        """Form the gradients of a step; float [6], on the device, what it measured.

        The loss, the gradients' norm, then losses and accuracies by direction, as in `Taken`: all
        over the whole batch, and alike in all processes but for rounding.
        """
        if not self._towers.is_settled:
            self._towers.is_settled = True
            self.gradients(step, batch)  # and thrown away
            self.leave_out()
        settings, device = self.settings, self.process.device
        torch.manual_seed(settings.seed << 32 | step)
        self.lr = optim.learning_rate(step, self._steps, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self._before = [buffer.clone() for buffer in self._statistics]
        self.optimizer.zero_grad(set_to_none=True)
        image = batch.image.to(device, non_blocking=True)
        tokens = batch.tokens.to(device, non_blocking=True)
        chunk = len(image) if settings.chunk == "all" else settings.chunk
        measured = grad_cache.backward(self._towers, image, tokens, self._objective(batch), chunk)
        norm = parallel.gradient_norm(self._parameters)
        return torch.cat([measured.loss[None], norm[None], *measured[1:]])

    def update(self, grad_norm: float) -> None:
        """Take the step. `grad_norm` is equal in all processes to the last bit."""
        if self.settings.clip_gradients:
            parallel.scale_gradients(self._parameters, grad_norm, self.settings.max_grad_norm)
        self.optimizer.step()
        if self.settings.loss == "contrastive":
            self.net.clamp_temperature()

    def leave_out(self) -> None:
        """Undo what the step has left in the statistics of normalisation, and take it not."""
        for buffer, value in zip(self._statistics, self._before, strict=True):
            buffer.copy_(value)

    def _objective(self, batch: Batch) -> Objective:
        tile = self.settings.loss_tile
        if self.settings.loss == "siglip":
            if self.pair_bias is not None:
                raise ConfigError("train.loss: pairs are weighed under the contrastive loss only")
            return partial(sigmoid_loss, tile=tile)
        bias = None if self.pair_bias is None else self.pair_bias(batch)
        return partial(contrast, tile=tile, bias=bias)

    def whole_net(self) -> CLIP:
        """The model with all its weights, in the first process; every process calls it."""
        if not isinstance(self._towers, parallel.Sharded):
            return self.net
        options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = sharded.get_model_state_dict(self.net, options=options)
        if not self.process.leads:
            return self.net
        net = CLIP(self._model)
        net.load_state_dict(weights)
        return net

    @cached_property
    def flops_per_sample(self) -> int:
        """Floating-point operations of the towers for one pair, forward and backward."""
        return flops.training_flops(self._model)


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
