"""How the two towers run: alone, on two threads, replicated (DDP) or sharded (FSDP2).

Running statistics of batch normalisation stay each process's own while training, where nothing
reads them; those of the first process are the model's. A ResNet's batches are normalised by this
process's part of them unless `train.sync_batchnorm` is on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pipeline.config import ConfigError
from train import towers
from train.distributed import Process
from train.model import CLIP
from train.settings import TrainSettings

FSDP_PARAMETERS = 800_000_000
"""Where `train.parallel: auto` begins to shard: 16 bytes each (weight, gradient, AdamW's two means)
are 13 GB in every process. ViT-H/14 has 986 million, ViT-L/14 428."""

# DDP's option that broadcasts buffers before every step, under this version's name.
_NO_BROADCAST: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}


class Towers:
    """The model in one process: features forward, gradients backward."""

    is_settled = True
    """Whether the next pass rounds as all later ones do."""

    def __init__(self, net: CLIP, process: Process, *, bfloat16: bool) -> None:
        self.net = net
        self.device = process.device
        self._bfloat16 = bfloat16

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """What `CLIP.forward` returns; image and tokens are on the device."""
        with self._autocast():
            outputs: tuple[Tensor, ...] = self._module(image, tokens)
        return outputs

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add to the parameters' gradients, from those of what `forward` returned."""
        torch.autograd.backward(outputs, gradients)

    def unsynchronised(self) -> AbstractContextManager[None]:
        """Within it, forward and backward leave gradients to a later backward to be averaged."""
        return nullcontext()

    @property
    def _module(self) -> nn.Module:
        return self.net

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16)


class Threaded(Towers):
    """Each tower on a thread of its own, forward and backward: for one process on a CPU.

    The operations of small towers leave processors waiting for each other; two towers at a time
    leave fewer. The towers share no parameter, and the text tower draws no random number, so the
    result is that of one after the other.
    """

    def __init__(self, net: CLIP, process: Process, *, bfloat16: bool) -> None:
        super().__init__(net, process, bfloat16=bfloat16)
        # As many threads compute for each tower as there are: one that waits leaves its processor
        # to the other's.
        self._other = ThreadPoolExecutor(
            1, "text-tower", torch.set_num_threads, (torch.get_num_threads(),)
        )

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """As `Towers.forward`."""
        texts = self._other.submit(self._encode_text, tokens, torch.is_grad_enabled())
        with self._autocast():
            images = self.net.encode_image(image)
        return images, texts.result(), *self.net.scalars()

    def _encode_text(self, tokens: Tensor, differentiable: bool) -> Tensor:
        # Autograd's and autocast's modes are each thread's own.
        with torch.set_grad_enabled(differentiable), self._autocast():
            return self.net.encode_text(tokens)

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """As `Towers.backward`: on the CPU, autograd works on the thread that calls it."""
        images, texts, *scalars = zip(outputs, gradients, strict=True)
        done = self._other.submit(torch.autograd.backward, *texts)
        for output, gradient in (images, *scalars):
            torch.autograd.backward(output, gradient)
        done.result()


class Replicated(Towers):
    """The whole model in every process; gradients are averaged while going backward."""

    def __init__(self, net: CLIP, process: Process, *, bfloat16: bool) -> None:
        super().__init__(net, process, bfloat16=bfloat16)
        # After its first pass, DDP groups the gradients anew, and groups decide how sums are
        # rounded: the first step after a restart would round as no other does.
        self.is_settled = False
        self._replica = DistributedDataParallel(
            net,
            gradient_as_bucket_view=True,
            # Not static_graph: steps after a restart would round as none did before.
            **_NO_BROADCAST,  # see the top
        )

    def unsynchronised(self) -> AbstractContextManager[None]:
        """As `Towers.unsynchronised`."""
        return self._replica.no_sync()

    @property
    def _module(self) -> nn.Module:
        return self._replica


class Sharded(Towers):
    """A part of every tower in each process; the temperature, one number, is whole in all.

    Gradients are averaged and scattered in every backward, so that whole ones never accumulate.
    """

    def __init__(self, net: CLIP, process: Process, *, bfloat16: bool) -> None:
        super().__init__(net, process, bfloat16=bfloat16)
        net.to(memory_format=torch.contiguous_format)  # FSDP shards no other
        mesh = init_device_mesh(process.device.type, (process.world,))
        for tower in (net.visual, net.text):
            # Weights travel as they are used; gradients are averaged in float32. Where batches are
            # normalised, weights stay float32.
            halves = bfloat16 and not any(isinstance(m, _BatchNorm) for m in tower.modules())
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if halves else None, reduce_dtype=torch.float32
            )
            for part in [*towers.stages(tower), tower]:
                fully_shard(part, mesh=mesh, mp_policy=policy)
        self._world = process.world

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """As `Towers.backward`; the scalars' gradients, where given, are averaged here."""
        super().backward(outputs, gradients)
        if len(outputs) > 2:
            for scalar in (self.net.logit_scale, self.net.logit_bias):
                if scalar is not None and scalar.grad is not None:
                    dist.all_reduce(scalar.grad)
                    scalar.grad /= self._world


def place(net: CLIP, settings: TrainSettings, process: Process, *, bfloat16: bool) -> Towers:
    """Prepare the model, in place and on the process's device, for training as settings say."""
    device = process.device
    mode = _mode(net, settings, process)
    if settings.sync_batchnorm:
        if device.type != "cuda":
            raise ConfigError("train.sync_batchnorm: torch synchronises statistics on GPUs only")
        if process.world > 1:
            net.visual = nn.SyncBatchNorm.convert_sync_batchnorm(net.visual)
    compiled = device.type == "cuda" if settings.compile == "auto" else settings.compile
    if compiled and settings.chunk != "all":
        # Random numbers as eager torch draws them: kernels of the two passes would number their
        # own ones differently.
        torch._inductor.config.fallback_random = True
    for tower in (net.visual, net.text):
        if settings.checkpoint_activations and not towers.blocks(tower):
            raise ConfigError(
                f"train.checkpoint_activations: {type(tower).__name__} has no blocks to repeat; "
                "set it to false"
            )
        if compiled:
            # Whole towers, unless their parts are gathered or repeated one by one.
            for part in (
                towers.blocks(tower)
                if settings.checkpoint_activations
                else towers.stages(tower)
                if mode == "fsdp"
                else [tower]
            ):
                _compile(part)
        if settings.checkpoint_activations:
            for block in towers.blocks(tower):
                _repeat(block)
    if mode == "fsdp":
        return Sharded(net, process, bfloat16=bfloat16)
    if mode == "ddp":
        return Replicated(net, process, bfloat16=bfloat16)
    alone = not settings.checkpoint_activations and not compiled
    if device.type == "cpu" and torch.get_num_threads() > 1 and alone and _is_sober(net):
        return Threaded(net, process, bfloat16=bfloat16)
    return Towers(net, process, bfloat16=bfloat16)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within it, batch normalisation leaves its running statistics alone: for work done twice."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Running statistics stay an operand, so that checkpointing finds the graph it expects.
        assert norm.num_batches_tracked is not None
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, sharded ones across processes."""
    grads = [p.grad for p in parameters if p.grad is not None]
    shards = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    whole = nn.utils.get_total_norm([grad for grad in grads if not isinstance(grad, DTensor)])
    if not shards:
        return whole
    square = nn.utils.get_total_norm(shards).square()
    dist.all_reduce(square)
    return (square + whole.square()).sqrt()


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], norm: float, max_norm: float) -> None:
    """Scale all gradients, whose norm is `norm`, down to `max_norm` where it is above."""
    factor = min(1.0, max_norm / (norm + 1e-6))
    for p in parameters:
        if p.grad is not None:
            (p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad).mul_(factor)


def _mode(net: CLIP, settings: TrainSettings, process: Process) -> Literal["alone", "ddp", "fsdp"]:
    if process.world == 1:
        return "alone"
    if settings.parallel != "auto":
        return settings.parallel
    large = sum(p.numel() for p in net.parameters()) >= FSDP_PARAMETERS
    return "fsdp" if large else "ddp"


def _compile(module: nn.Module) -> None:
    """Compile what a module does; its name, parameters and hooks stay."""
    module.forward = torch.compile(module.forward)


def _repeat(block: nn.Module) -> None:
    """Let a block keep only its input, and compute the rest again on the way back."""
    forward: Any = block.forward
    block.forward = partial(
        checkpoint,
        forward,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), frozen_statistics(block)),
    )


@torch.no_grad()
def _is_sober(net: CLIP) -> bool:
    """Whether the text tower draws no random numbers: two threads would draw in any order."""
    before = torch.get_rng_state()
    net.encode_text(torch.ones(1, net.context_length, dtype=torch.int64))
    return torch.equal(before, torch.get_rng_state())
