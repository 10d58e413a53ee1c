"""The tiled, sharded loss against open_clip's dense one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from train.loss import contrastive_loss

BATCH, WIDTH = 24, 9


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = F.normalize(torch.randn(BATCH, WIDTH, generator=generator, dtype=dtype), dim=-1)
    texts = F.normalize(torch.randn(BATCH, WIDTH, generator=generator, dtype=dtype), dim=-1)
    return images, texts, torch.tensor(13.7, dtype=dtype)


def _dense() -> tuple[Tensor, list[Tensor]]:
    from open_clip import ClipLoss

    leaves = [value.requires_grad_() for value in _inputs()]
    loss = ClipLoss()(*leaves)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("tile", [1, 5, 7, 23, 24, 1000])
def test_value_and_gradients_are_those_of_the_dense_loss(tile: int) -> None:
    expected, gradients = _dense()
    leaves = [value.requires_grad_() for value in _inputs()]
    loss = contrastive_loss(*leaves, tile=tile)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert gradient.shape == leaf.shape
    loss = contrastive_loss(*leaves, tile=tile)
    for actual, gradient in zip(torch.autograd.grad(loss, leaves), gradients, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-12)


def test_the_upstream_gradient_multiplies() -> None:
    leaves = [value.requires_grad_() for value in _inputs()]
    once = torch.autograd.grad(contrastive_loss(*leaves, tile=7), leaves)
    thrice = torch.autograd.grad(3 * contrastive_loss(*leaves, tile=7), leaves)
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * one, three)


def test_autocast_does_not_reach_the_loss() -> None:
    images, texts, scale = _inputs(torch.float32)
    plain = contrastive_loss(images, texts, 100 / 13.7 * scale)
    with torch.autocast("cpu", torch.bfloat16):
        under = contrastive_loss(images, texts, 100 / 13.7 * scale)
    assert under.dtype == torch.float32
    assert torch.equal(plain, under)


def test_a_scale_of_one_hundred_does_not_overflow() -> None:
    images, _, _ = _inputs(torch.float32)
    scale = torch.tensor(100.0, requires_grad=True)
    loss = contrastive_loss(images, -images, scale, tile=5)
    loss.backward()
    assert 100 < loss.item() < 300
    assert scale.grad is not None
    assert scale.grad.isfinite()


def test_mismatched_features_are_refused() -> None:
    images, texts, scale = _inputs()
    with pytest.raises(ValueError, match="one shape"):
        contrastive_loss(images, texts[:-1], scale)
    with pytest.raises(ValueError, match="tile"):
        contrastive_loss(images, texts, scale, tile=0)


@pytest.mark.parametrize(("world", "tile"), [(2, 5), (4, 1000)])
def test_ranks_together_are_exact(world: int, tile: int, tmp_path: Path) -> None:
    """The mean over ranks, as data-parallel training takes it, is the gradient of one process."""
    mp.spawn(_rank, (world, tile, str(tmp_path)), nprocs=world)
    expected, (images, texts, scale) = _dense()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for part in parts:
        torch.testing.assert_close(part["loss"], expected, rtol=1e-12, atol=0)
    gathered = torch.cat([part["images"] for part in parts]) / world
    torch.testing.assert_close(gathered, images, rtol=1e-9, atol=1e-12)
    gathered = torch.cat([part["texts"] for part in parts]) / world
    torch.testing.assert_close(gathered, texts, rtol=1e-9, atol=1e-12)
    mean = sum(part["scale"] for part in parts) / world
    torch.testing.assert_close(mean, scale, rtol=1e-9, atol=0)


def _rank(rank: int, world: int, tile: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    images, texts, scale = _inputs()
    leaves = [
        images.chunk(world)[rank].clone().requires_grad_(),
        texts.chunk(world)[rank].clone().requires_grad_(),
        scale.requires_grad_(),
    ]
    loss = contrastive_loss(*leaves, tile=tile)
    gradients = torch.autograd.grad(loss, leaves)
    named = dict(zip(("images", "texts", "scale"), gradients, strict=True))
    torch.save({"loss": loss.detach(), **named}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
