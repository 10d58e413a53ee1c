"""Training that goes on from trained weights, perhaps at another resolution.

So the paper made its best model: one more epoch of ViT-L/14 with pictures of 336 pixels.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from pipeline.config import ConfigError

log = logging.getLogger(__name__)


def load(path: Path, net: nn.Module) -> None:
    """Put the weights of a `model.safetensors` into `net`, whole or sharded, in place.

    The grid of the image tower's position embeddings is resized where the resolution differs.
    Raises `ConfigError` if the towers are not the same otherwise.
    """
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"train.init_from: {path}: no safetensors can be read ({error})"
        ) from None
    wanted = net.state_dict()
    for name in weights.keys() & wanted.keys():
        if name.startswith("visual.") and name.endswith("positional_embedding"):
            weights[name] = _resized(weights[name], len(wanted[name]))
    if differing := _differing(weights, wanted):
        raise ConfigError(
            f"train.init_from: {path} is not of the model that train.model describes; of "
            f"{len(wanted)} tensors {len(differing)} differ, the first is {differing[0]}"
        )
    state: dict[str, Any] = dict(weights)
    set_model_state_dict(net, state, options=StateDictOptions(full_state_dict=True))
    log.info("starting from the weights of %s", path)


def _differing(weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    shapes = [{name: tuple(t.shape) for name, t in side.items()} for side in (weights, wanted)]
    names = sorted(shapes[0].keys() | shapes[1].keys())
    return [name for name in names if shapes[0].get(name) != shapes[1].get(name)]


def _resized(embeddings: Tensor, length: int) -> Tensor:
    """[1 + grid^2, width] to [length, width]; the first row, the class's or the mean's, stays.

    Bicubic; antialiased, so that a smaller grid is an average of the larger one.
    """
    old, new = math.isqrt(len(embeddings) - 1), math.isqrt(length - 1)
    if old == new or old * old != len(embeddings) - 1 or new * new != length - 1:
        return embeddings
    grid = embeddings[1:].float().T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    resized = embeddings.new_empty(length, embeddings.shape[1])
    resized[0] = embeddings[0]
    resized[1:] = grid.reshape(-1, new * new).T
    log.info("position embeddings resized from %d x %d to %d x %d", old, old, new, new)
    return resized
