"""CLIP: an image tower, a text tower, and a learned temperature.

Each tower ends in a linear projection into the common space; nothing non-linear lies between a
tower's representation and that space.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train import towers
from train.data import tokenizer

MAX_LOG_SCALE = math.log(100)
"""The temperature never falls below 0.01, for stability (section 2.5 of the paper)."""
SIGLIP_BIAS = -10.0
"""SigLIP's bias at the start: nearly all pairs of a batch are no pairs."""
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation of RGB in 0..1, so that weights and pictures fit those of others."""


class CLIP(nn.Module):
    """Two towers and `logit_scale`, the logarithm of the inverse temperature.

    Where `model` has an `init_logit_bias`, there is a `logit_bias` too, for SigLIP's loss.
    Parameter names are those of `open_clip.CustomTextCLIP`.
    """

    def __init__(
        self, model: dict[str, Any], init_temperature: float = 0.07, residual_gain: float = 0.0
    ) -> None:
        super().__init__()
        self.visual, self.text = towers.build(model)
        self.context_length = towers.context_length(model)
        self.image_size = towers.image_size(model)
        towers.set_residual_gain(self.visual, residual_gain)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / init_temperature)))
        bias = model.get("init_logit_bias")
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        mean = torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1)
        std = torch.tensor(PIXEL_STD).view(1, 3, 1, 1)
        self._mean: Tensor
        self._inverse_std: Tensor
        self.register_buffer("_mean", mean * 255, persistent=False)
        self.register_buffer("_inverse_std", 1 / (std * 255), persistent=False)
        self.visual.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """Image features, text features, both [batch, width] of length 1, and the `scalars`."""
        return self.encode_image(image), self.encode_text(tokens), *self.scalars()

    def scalars(self) -> tuple[Tensor, ...]:
        """The multiplier of similarities and, for SigLIP's loss, what is added to them."""
        scale = self.logit_scale.exp()
        return (scale,) if self.logit_bias is None else (scale, self.logit_bias)

    def encode_image(self, image: Tensor) -> Tensor:
        """uint8 [batch, 3, height, width] to float32 [batch, width] of length 1."""
        pixels = (image.float() - self._mean) * self._inverse_std
        features = self.visual(pixels.contiguous(memory_format=torch.channels_last))
        return _normalised(features)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 [batch, context] to float32 [batch, width] of length 1."""
        return _normalised(self.text(tokens))

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Hold the multiplier at 100 or less."""
        self.logit_scale.clamp_(max=MAX_LOG_SCALE)


def _normalised(features: Tensor) -> Tensor:
    """In float32 at least, whatever the tower computed in."""
    precise = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(precise, dim=-1)


class Tokenizer(tokenizer.Tokenizer):
    """CLIP's byte-pair encoding of lower-cased text: 49,408 tokens."""

    def batch(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 [texts, context]."""
        return torch.from_numpy(np.stack([self(text) for text in texts]))


def save_model(
    folder: Path,
    net: CLIP,
    model: dict[str, Any],
    margin: int,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write `model.safetensors` and `model.json`; equal weights give equal bytes.

    `training` is what the weights came from: settings, the dataset's fingerprint, pairs seen.
    """
    from safetensors.torch import save_file

    weights = {name: value.contiguous().cpu() for name, value in net.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    preprocess = {
        "size": towers.image_size(model),
        "resize": towers.image_size(model) + margin,
        "mean": PIXEL_MEAN,
        "std": PIXEL_STD,
    }
    if net.logit_bias is not None:
        model = {**model, "init_logit_bias": SIGLIP_BIAS}
    parts = {"model_cfg": model, "preprocess_cfg": preprocess, "training": dict(training or {})}
    text = json.dumps(parts, indent=1, sort_keys=True)
    (folder / "model.json").write_text(text + "\n")


def load_model(description: Path, weights: Path) -> tuple[CLIP, dict[str, Any]]:
    """The model behind `model.json` and `model.safetensors`, in evaluation mode, and the former."""
    from safetensors.torch import load_file

    saved = json.loads(description.read_text())
    net = CLIP(saved["model_cfg"])
    net.load_state_dict(load_file(weights))
    return net.eval(), saved
