"""Gradients chunk by chunk against those of one graph over the whole batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.conftest import TINY_MODEL
from tests.train.ranks import together
from train import grad_cache, towers
from train.distributed import Process
from train.loss import contrast, sigmoid_loss
from train.model import CLIP, SIGLIP_BIAS
from train.parallel import Replicated, Towers
from train.settings import ModelSettings

BATCH = 8
VIT = {"tower": "vit", "layers": [2], "width": 16, "head_width": 8, "patch_size": 8}
CPU = torch.device("cpu")

Weights = dict[str, Tensor]


def _net(*, patch_dropout: float = 0.0, siglip: bool = False, **changes: Any) -> CLIP:
    model = towers.description(ModelSettings.model_validate({**TINY_MODEL, **changes}))
    model["vision_cfg"] = {**model["vision_cfg"]}
    if patch_dropout:
        model["vision_cfg"]["patch_dropout"] = patch_dropout
    if siglip:
        model["init_logit_bias"] = SIGLIP_BIAS
    torch.manual_seed(3)
    return CLIP(model, residual_gain=1.0).double().train()


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    image = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 400, (BATCH, 8), generator=generator)
    tokens[:, -1] = 49407
    return image, tokens


def _gradients(net: CLIP) -> Weights:
    found = {name: p.grad for name, p in net.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return {name: grad for name, grad in found.items() if grad is not None}


def _in_one_graph(net: CLIP, chunk: int, loss: Any) -> tuple[Tensor, Weights]:
    """Chunks one after the other, drawing as they come; one graph over all; autograd."""
    torch.manual_seed(9)
    image, tokens = _batch()
    parts = [net(*part) for part in zip(image.split(chunk), tokens.split(chunk), strict=True)]
    images, texts, *scalars = zip(*parts, strict=True)
    measured = loss(torch.cat(images), torch.cat(texts), *(scalar[-1] for scalar in scalars))
    measured.loss.backward()
    return measured.loss.detach(), _gradients(net)


def _cached(net: CLIP, chunk: int, loss: Any) -> tuple[Tensor, Weights]:
    torch.manual_seed(9)
    both = Towers(net, Process(0, 1, CPU), bfloat16=False)
    measured = grad_cache.backward(both, *_batch(), loss, chunk)
    return measured.loss, _gradients(net)


def _assert_equal(actual: Weights, expected: Weights, rtol: float = 1e-9) -> None:
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=rtol * largest, msg=name)


@pytest.mark.parametrize("chunk", [8, 4, 3, 2])
@pytest.mark.parametrize(
    ("changes", "loss"),
    [
        ({**VIT, "patch_dropout": 0.5}, partial(contrast, tile=3)),
        ({}, partial(contrast, tile=3)),
        ({**VIT, "siglip": True}, sigmoid_loss),
    ],
    ids=["vit with patch dropout", "resnet", "siglip"],
)
def test_chunks_give_the_gradients_of_one_graph(
    chunk: int, changes: dict[str, Any], loss: Any
) -> None:
    expected_loss, expected = _in_one_graph(_net(**changes), chunk, loss)
    actual_loss, actual = _cached(_net(**changes), chunk, loss)
    torch.testing.assert_close(actual_loss, expected_loss, rtol=1e-12, atol=0)
    _assert_equal(actual, expected)


def test_the_number_of_chunks_changes_nothing() -> None:
    whole = _cached(_net(**VIT), BATCH, contrast)
    for chunk in (4, 2, 1):
        loss, gradients = _cached(_net(**VIT), chunk, contrast)
        torch.testing.assert_close(loss, whole[0], rtol=1e-12, atol=0)
        _assert_equal(gradients, whole[1])


def test_statistics_are_updated_once_a_chunk() -> None:
    net, by_hand = _net(), _net()
    _cached(net, 4, contrast)
    with torch.no_grad():
        for part in _batch()[0].split(4):
            by_hand.encode_image(part)
    expected = dict(by_hand.visual.named_buffers())
    assert int(expected["bn1.num_batches_tracked"]) == 2
    for name, value in net.visual.named_buffers():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("chunk", [4, 2, 1])
def test_two_processes_average_to_the_gradients_of_one(chunk: int, tmp_path: Path) -> None:
    together(tmp_path, 2, _rank, chunk)
    expected_loss, expected = _in_one_graph(_net(**VIT), BATCH, contrast)
    for rank in range(2):
        saved = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(saved["loss"], expected_loss, rtol=1e-12, atol=0)
        _assert_equal(saved["gradients"], expected)


def _rank(rank: int, world: int, folder: Path, chunk: int) -> None:
    net = _net(**VIT)
    both = Replicated(net, Process(rank, world, CPU), bfloat16=False)
    part = [value.chunk(world)[rank] for value in _batch()]
    for _ in range(2):  # a second step finds DDP's buckets and graph as the first one left them
        net.zero_grad(set_to_none=True)
        measured = grad_cache.backward(both, part[0], part[1], contrast, chunk)
    torch.save({"loss": measured.loss, "gradients": _gradients(net)}, folder / f"{rank}.pt")
