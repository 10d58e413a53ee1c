"""A step of training against open_clip's: its model class, its ClipLoss, its loop.

The peer is the loop of open_clip's trainer, written out: the model of the same configuration with
the same weights, dense loss within autocast, AdamW with the same groups. It gets pictures that are
normalised already; ours normalises bytes. Without a GPU: two small models, in turns in one process;
`cpu_ratio` is that of processor time. With one: the paper's models, each side alone on it, at the
largest batch that fits.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import seconds
from train import optim, towers
from train.data.loader import Batch
from train.distributed import Process
from train.flops import training_flops
from train.model import CLIP, PIXEL_MEAN, PIXEL_STD
from train.settings import TrainSettings
from train.step import TrainStep, use_threads, wants_bfloat16

STEPS = 10_000
SMALL: dict[str, dict[str, Any]] = {
    "small ViT": {
        "name": "custom",
        "tower": "vit",
        "image_size": 64,
        "patch_size": 8,
        "layers": [4],
        "width": 192,
        "text_width": 128,
    },
    "small ResNet": {
        "name": "custom",
        "tower": "resnet",
        "image_size": 64,
        "layers": [2, 2, 1, 1],
        "width": 24,
        "text_width": 128,
        "residual_gain": 1.0,
    },
}
SMALL_BATCH = 64
LARGE = ("ViT-B-32", "ViT-B-16", "RN50")
# Dense matrix products in bfloat16, operations a second, as the makers state them.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}

_WARMUP_STEPS, _TIMED_STEPS, _ROUNDS, _TURNS = 2, 10, 3, 30


class Peer:
    """One step of open_clip's `train_one_epoch` after another."""

    def __init__(
        self,
        settings: TrainSettings,
        steps: int,
        weights: dict[str, Tensor],
        device: torch.device,
    ) -> None:
        from open_clip import ClipLoss, CustomTextCLIP

        model = towers.description(settings.model)
        parts = {name: model[name] for name in ("embed_dim", "vision_cfg", "text_cfg")}
        net = CustomTextCLIP(**parts, quick_gelu=model.get("quick_gelu", False), output_dict=True)
        net.load_state_dict(weights)
        self.net: nn.Module = net.to(device).train()
        self._forward: Callable[..., dict[str, Tensor]] = self.net
        self._loss = ClipLoss()
        self._settings, self._steps, self._device = settings, steps, device
        self._bfloat16 = wants_bfloat16(settings.precision, device)
        named = list(self.net.named_parameters())
        excluded = [
            p.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))
            for name, p in named
        ]
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for (_, p), no in zip(named, excluded, strict=True) if no],
                    "weight_decay": 0.0,
                },
                {
                    "params": [p for (_, p), no in zip(named, excluded, strict=True) if not no],
                    "weight_decay": settings.weight_decay,
                },
            ],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
        )

    def compile(self) -> None:
        """As open_clip does with --torchcompile."""
        self._forward = torch.compile(self.net)

    def __call__(self, step: int, pixels: Tensor, tokens: Tensor) -> float:
        """The loss of an update; `pixels` are normalised float32."""
        for group in self.optimizer.param_groups:
            group["lr"] = optim.learning_rate(step, self._steps, self._settings)
        pixels = pixels.to(self._device, non_blocking=True)
        tokens = tokens.to(self._device, non_blocking=True)
        self.optimizer.zero_grad()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            losses = self._loss(**self._forward(pixels, tokens), output_dict=True)
            total: Tensor = sum(losses.values(), torch.zeros((), device=self._device))
        torch.autograd.backward(total)
        self.optimizer.step()
        with torch.no_grad():
            scale = self.net.get_parameter("logit_scale")
            scale.clamp_(0, math.log(100))
        return total.item()


def batch_of(settings: TrainSettings, size: int, step: int = 0) -> Batch:
    """Noise and random tokens, of the shapes that the model takes."""
    model = towers.description(settings.model)
    side, context = towers.image_size(model), towers.context_length(model)
    generator = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 49_000, (size, context), generator=generator)
    tokens[:, -1] = 49_407
    return Batch(step, image, tokens, [], 0, [])


def normalised(image: Tensor) -> Tensor:
    """Pixels as open_clip's loader makes them."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (image / 255 - mean) / std


def measure() -> Iterator[dict[str, Any]]:
    """Samples a second; on a GPU utilisation and peak memory too."""
    yield from _on_gpu() if torch.cuda.is_available() else _on_cpu()


def _settings(model: dict[str, Any], **changes: Any) -> TrainSettings:
    return TrainSettings.model_validate({"model": model, "lr": 1e-4, "warmup_steps": 10} | changes)


def _on_cpu() -> Iterator[dict[str, Any]]:
    # As the stage `train` does, for both sides; torch reads it when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for name in SMALL:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield pool.submit(_small, name).result()


def _small(name: str) -> dict[str, Any]:
    use_threads("all")
    settings = _settings(SMALL[name], batch=SMALL_BATCH)
    ours, peer = _both(settings, Process(0, 1, torch.device("cpu")))
    batch = batch_of(settings, SMALL_BATCH)
    both: list[Callable[[], object]] = [
        partial(ours, batch),
        partial(peer, 0, normalised(batch.image), batch.tokens),
    ]
    for once in both:
        _repeat(once, _WARMUP_STEPS)
    # A step each in turns, and medians: the best of a few long runs is luck on a shared machine.
    took: list[list[tuple[float, float]]] = [[], []]
    for _ in range(_TURNS):
        for once, times in zip(both, took, strict=True):
            cpu_s = time.process_time()
            wall_s, _result = seconds(once)
            times.append((wall_s, time.process_time() - cpu_s))
    (ours_s, ours_cpu_s), (peer_s, peer_cpu_s) = (
        map(median, zip(*times, strict=True)) for times in took
    )
    return {
        "name": f"step: {name}",
        "peer_name": "open_clip",
        "ours": round(SMALL_BATCH / ours_s, 1),
        "peer": round(SMALL_BATCH / peer_s, 1),
        "ratio": round(peer_s / ours_s, 2),
        "cpu_ratio": round(peer_cpu_s / ours_cpu_s, 2),
        "unit": "samples/s",
        "batch": SMALL_BATCH,
        "parameters": sum(p.numel() for p in ours.net.parameters()),
        "gflops_per_sample": round(ours.flops_per_sample / 1e9, 3),
        "threads": torch.get_num_threads(),
        "device": "CPU",
    }


def _repeat(once: Callable[[], object], times: int) -> None:
    for _ in range(times):
        once()


def _both(settings: TrainSettings, process: Process) -> tuple[TrainStep, Peer]:
    """Ours and the peer, from the same weights."""
    ours = TrainStep(settings, STEPS, towers.description(settings.model), process)
    weights = {name: value.clone() for name, value in ours.net.state_dict().items()}
    return ours, Peer(settings, STEPS, weights, process.device)


def _on_gpu() -> Iterator[dict[str, Any]]:
    device = torch.device("cuda", 0)
    card = torch.cuda.get_device_name(device)
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in card.split()), None)
    for name in LARGE:
        for compiled in (False, True):
            settings = _settings({"name": name}, compile=compiled)
            sides = {"ours": _ours_on_gpu, "peer": _peer_on_gpu}
            found = {side: _largest(make, settings, device) for side, make in sides.items()}
            (ours_batch, ours_s, ours_gb), (peer_batch, peer_s, peer_gb) = found.values()
            ours_rate, peer_rate = ours_batch / ours_s, peer_batch / peer_s
            flops = training_flops(towers.description(settings.model))
            yield {
                "name": f"step: {name}{', compiled' if compiled else ''}",
                "peer_name": "open_clip",
                "ours": round(ours_rate, 1),
                "peer": round(peer_rate, 1),
                "ratio": round(ours_rate / peer_rate, 2),
                "unit": "samples/s",
                "ours_mfu": peak and round(ours_rate * flops / peak, 3),
                "peer_mfu": peak and round(peer_rate * flops / peak, 3),
                "ours_batch": ours_batch,
                "peer_batch": peer_batch,
                "ours_peak_gb": ours_gb,
                "peer_peak_gb": peer_gb,
                "device": card,
            }


def _ours_on_gpu(settings: TrainSettings, size: int, device: torch.device) -> Callable[[], object]:
    described = towers.description(settings.model)
    step = TrainStep(settings, STEPS, described, Process(0, 1, device))
    batch = batch_of(settings, size)
    return lambda: step(batch)


def _peer_on_gpu(settings: TrainSettings, size: int, device: torch.device) -> Callable[[], object]:
    weights = CLIP(towers.description(settings.model)).state_dict()
    peer = Peer(settings, STEPS, weights, device)
    if settings.compile:
        peer.compile()
    batch = batch_of(settings, size)
    pixels = normalised(batch.image)
    return lambda: peer(0, pixels, batch.tokens)


def _timed(once: Callable[[], object], device: torch.device) -> None:
    _repeat(once, _TIMED_STEPS)
    torch.cuda.synchronize(device)


def _largest(
    make: Callable[[TrainSettings, int, torch.device], Callable[[], object]],
    settings: TrainSettings,
    device: torch.device,
) -> tuple[int, float, float]:
    """(largest power of two that fits as a batch, seconds a step, peak GB)."""
    best: tuple[int, float, float] | None = None
    size = 64
    while True:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            once = make(settings, size, device)
            _repeat(once, _WARMUP_STEPS)
            torch.cuda.synchronize(device)
            took = min(seconds(partial(_timed, once, device))[0] for _ in range(_ROUNDS))
        except torch.cuda.OutOfMemoryError:
            if best is None:
                raise
            return best
        best = size, took / _TIMED_STEPS, round(torch.cuda.max_memory_allocated(device) / 1e9, 1)
        size *= 2
