"""Recipes: the hyper-parameters of the CLIP paper for each of its models, and two small ones.

A preset lies beneath the keys that a configuration gives. Where the batch differs from the preset's
and the learning rate or the warm-up is not given, `scaled` derives it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

PAPER_PAIRS = 12_800_000_000
"""32 epochs of 400 million pairs (section 2.5)."""
MAX_WARMUP_SHARE = 0.1
"""No derived warm-up takes more of a run, so that short ones are not all warm-up."""

_RESNET: dict[str, Any] = {"beta2": 0.999, "eps": 1e-8}
_VIT: dict[str, Any] = {"beta2": 0.98, "eps": 1e-6}


def _paper(model: str, lr: float, family: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Table 18 for what all models share, 19 and 20 for what each has of its own.

    The `quickgelu` configurations are those of OpenAI's models.
    """
    return {
        "samples": PAPER_PAIRS,
        "batch": 32_768,
        "lr": lr,
        "warmup_steps": 2000,
        "weight_decay": 0.2,
        "beta1": 0.9,
        **family,
        "model": {"name": f"{model}-quickgelu", "init_temperature": 0.07},
        "data": {"margin": 0},
        **more,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "RN50": _paper("RN50", 5e-4, _RESNET),
    "RN101": _paper("RN101", 5e-4, _RESNET),
    "RN50x4": _paper("RN50x4", 5e-4, _RESNET),
    "RN50x16": _paper("RN50x16", 4e-4, _RESNET),
    "RN50x64": _paper("RN50x64", 3.6e-4, _RESNET),
    "ViT-B/32": _paper("ViT-B-32", 5e-4, _VIT),
    "ViT-B/16": _paper("ViT-B-16", 5e-4, _VIT),
    "ViT-L/14": _paper("ViT-L-14", 4e-4, _VIT),
    # One more epoch at a higher resolution, from the weights of ViT-L/14.
    "ViT-L/14@336": _paper("ViT-L-14-336", 2e-5, _VIT, samples=400_000_000),
    # About 12 epochs of CC12M, or of a dataset of its size.
    "single-gpu": {
        "samples": 128_000_000,
        "batch": 1024,
        "lr": 5e-4,
        "warmup_steps": 2000,
        "weight_decay": 0.2,
        "beta1": 0.9,
        **_VIT,
        "model": {"name": "ViT-S-16", "init_temperature": 0.07},
        "data": {"lanes": 128, "margin": 0, "workers": 8},
    },
    # Minutes on two cores, for pictures of 72 pixels such as the sample web's.
    "cpu": {
        "samples": 90_000,
        "batch": 128,
        "lr": 1e-3,
        "warmup_steps": 50,
        "weight_decay": 0.1,
        "beta1": 0.9,
        **_VIT,
        "model": {
            "name": "custom",
            "init_temperature": 0.07,
            "tower": "resnet",
            "image_size": 64,
            "layers": [2, 2, 1, 1],
            "width": 24,
            "embed_width": 128,
            "text_width": 128,
            "text_layers": 2,
            "text_heads": 2,
            "context_length": 24,
            "residual_gain": 1.0,
        },
        "data": {"lanes": 32, "block_samples": 64, "margin": 8},
        "checkpoint": {"max_lost_steps": 200},
    },
}
CONTINUED = {"ViT-L/14@336": "ViT-L/14"}
"""Presets that go on from another's weights."""


def canonical(name: str) -> str | None:
    """The preset's name, also for open_clip's spelling (`ViT-L-14-336-quickgelu`); else None."""
    return {_plain(known): known for known in PRESETS}.get(_plain(name))


def nearest(name: str) -> list[str]:
    """Presets whose names look like `name`, the likeliest first."""
    plain = {_plain(known): known for known in PRESETS}
    return [plain[near] for near in difflib.get_close_matches(_plain(name), plain, n=3)]


def with_preset(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings `given`, on top of the preset `name`; what the batch decides is derived."""
    preset = PRESETS[name]
    if given.get("loss", "contrastive") != "contrastive":
        # The temperature at the start is one of CLIP's loss; another loss has its own.
        model = {k: v for k, v in preset["model"].items() if k != "init_temperature"}
        preset = {**preset, "model": model}
    merged = _merge(preset, given)
    batch, samples = _integer(merged["batch"]), _integer(merged["samples"])
    if batch and samples:  # else the fields' own checks will complain
        lr, warmup_steps = scaled(name, batch, samples)
        merged |= {"lr": given.get("lr", lr)}
        merged |= {"warmup_steps": given.get("warmup_steps", warmup_steps)}
    return merged


def scaled(name: str, batch: int, samples: int) -> tuple[float, int]:
    """Learning rate and warm-up steps of a preset for another batch or length of training.

    Adam's steps have a size of their own, whatever the gradient's; what a smaller batch changes is
    their noise, so the rate falls with the square root of the batch (Malladi et al. 2022, "On the
    SDEs and scaling rules for adaptive gradient algorithms"). A larger batch does not raise it. The
    warm-up sees as many pairs as the preset's, but no more than a tenth of the run.
    """
    preset = PRESETS[name]
    lr = preset["lr"]
    if batch < preset["batch"]:
        lr = float(f"{lr * math.sqrt(batch / preset['batch']):.4g}")
    steps = -(-samples // batch)
    same_pairs = -(-preset["warmup_steps"] * preset["batch"] // batch)
    return lr, min(same_pairs, int(steps * MAX_WARMUP_SHARE))


def _plain(name: str) -> str:
    plain = name.lower().replace("/", "-").replace("@", "-").replace("_", "-")
    return plain.removesuffix("-quickgelu").removesuffix("px")


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key, value in below.items():
        if isinstance(value, Mapping) and isinstance(above.get(key, {}), Mapping):
            merged[key] = _merge(value, above.get(key, {}))
    return merged


def _integer(value: object) -> int | None:
    """What pydantic would make of it: 1024, "1024", 1.28e10."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return int(number) if number >= 1 and number.is_integer() else None
