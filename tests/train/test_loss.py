"""The tiled, sharded losses against dense ones, on one process and on several."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.train.ranks import together
from train.loss import Measured, contrast, contrastive_loss, sigmoid_loss

BATCH, WIDTH = 24, 9

Objective = Callable[..., Measured]


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = F.normalize(torch.randn(BATCH, WIDTH, generator=generator, dtype=dtype), dim=-1)
    noise = torch.randn(BATCH, WIDTH, generator=generator, dtype=dtype)
    texts = F.normalize(0.3 * images + 0.3 * noise, dim=-1)
    return images, texts, torch.tensor(13.7, dtype=dtype)


def _weights() -> Tensor:
    """Logarithms of pair weights: some pairs are no negatives at all, many half or less."""
    generator = torch.Generator().manual_seed(6)
    weights = torch.rand(BATCH, BATCH, generator=generator, dtype=torch.float64)
    bias = torch.where(weights < 0.1, float("-inf"), weights.log())
    bias[:, 3] = float("-inf")  # a text that is a negative of no image
    bias[4, :] = float("-inf")
    return bias.fill_diagonal_(0)


def _biased(*args: Tensor, tile: int) -> Measured:
    bias = _weights()

    def rows(start: int, stop: int) -> Tensor:
        assert 0 < stop - start <= tile
        return bias[start:stop]

    return contrast(*args, tile=tile, bias=rows)


CASES: dict[str, tuple[Objective, int]] = {
    "clip, tiles of 5": (partial(contrast, tile=5), 3),
    "clip, tiles of 1": (partial(contrast, tile=1), 3),
    "clip, one tile": (partial(contrast, tile=1000), 3),
    "weighted, tiles of 5": (partial(_biased, tile=5), 3),
    "weighted, one tile": (partial(_biased, tile=1000), 3),
    "siglip": (partial(sigmoid_loss, tile=5), 4),
}
"""Each with the number of its arguments: SigLIP has a bias besides the temperature."""


def _leaves(count: int) -> list[Tensor]:
    values = [*_inputs(), torch.tensor(-10.0, dtype=torch.float64)]
    return [value.requires_grad_() for value in values[:count]]


def _oracle(case: str) -> dict[str, Any]:
    """open_clip's dense losses on the whole batch; with weights, two plain cross entropies."""
    from open_clip import ClipLoss
    from open_clip.loss import SigLipLoss

    leaves = _leaves(CASES[case][1])
    images, texts, scale = leaves[:3]
    labels = torch.arange(BATCH)
    logits = scale * images @ texts.T
    if case.startswith("weighted"):
        logits = logits + _weights()
    directions = [F.cross_entropy(logits, labels), F.cross_entropy(logits.T, labels)]
    if case == "siglip":
        loss = SigLipLoss()(*leaves)
        directions = [loss, loss]
    else:
        loss = ClipLoss()(*leaves) if case.startswith("clip") else sum(directions) / 2
    hits = [(logits.argmax(dim) == labels).double().mean() for dim in (1, 0)]
    assert 0.1 < min(hits) < max(hits) < 0.95
    return {
        "loss": loss.detach(),
        "by_direction": torch.stack(directions).detach(),
        "accuracy": torch.stack(hits),
        "gradients": torch.autograd.grad(loss, leaves),
    }


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What every one of 1, 2 or 4 processes computed, for all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    together(folder, request.param, _rank)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def _rank(rank: int, world: int, folder: Path) -> None:
    results = {}
    for case, (objective, count) in CASES.items():
        leaves = [leaf.detach() for leaf in _leaves(count)]
        leaves[:2] = [leaf.chunk(world)[rank].clone() for leaf in leaves[:2]]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        measured = objective(*leaves)
        gradients = torch.autograd.grad(measured.loss, leaves)
        detached = {name: value.detach() for name, value in measured._asdict().items()}
        results[case] = {**detached, "gradients": gradients}
    torch.save(results, folder / f"{rank}.pt")


@pytest.mark.parametrize("case", CASES)
def test_processes_together_are_exact(case: str, ranks: list[dict[str, Any]]) -> None:
    """The mean over processes, as data-parallel training takes it, is that of the dense loss."""
    expected = _oracle(case)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-15)
    for part in ranks:
        for name in ("loss", "by_direction", "accuracy"):
            close(part[case][name].double(), expected[name])
    world = len(ranks)
    for place, gradient in enumerate(expected["gradients"]):
        parts = [part[case]["gradients"][place] for part in ranks]
        together = torch.cat(parts) if gradient.ndim else torch.stack(parts).sum()
        close(together / world, gradient, atol=1e-14)


def test_no_weights_change_no_bit() -> None:
    leaves = _inputs(torch.float32)
    plain = contrast(*leaves, tile=7)
    weighted = contrast(*leaves, tile=7, bias=lambda start, stop: torch.zeros(stop - start, BATCH))
    for one, other in zip(plain, weighted, strict=True):
        assert torch.equal(one, other)


def test_a_tie_is_no_hit() -> None:
    """A model that says the same of everything is not one that is always right."""
    same = F.normalize(torch.ones(6, 4), dim=-1)
    assert contrast(same, same, torch.tensor(10.0), tile=2).accuracy.tolist() == [0, 0]
    assert contrast(*[torch.eye(6)] * 2, torch.tensor(10.0), tile=4).accuracy.tolist() == [1, 1]


def test_the_upstream_gradient_multiplies() -> None:
    leaves = [value.requires_grad_() for value in _inputs()]
    once = torch.autograd.grad(contrastive_loss(*leaves, tile=7), leaves)
    thrice = torch.autograd.grad(3 * contrastive_loss(*leaves, tile=7), leaves)
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * one, three)


@pytest.mark.parametrize("objective", [contrast, partial(sigmoid_loss, logit_bias=-torch.ones(()))])
def test_autocast_does_not_reach_the_loss(objective: Objective) -> None:
    images, texts, scale = _inputs(torch.float32)
    plain = objective(images, texts, 100 / 13.7 * scale)
    with torch.autocast("cpu", torch.bfloat16):
        under = objective(images, texts, 100 / 13.7 * scale)
    assert under.loss.dtype == torch.float32
    assert torch.equal(plain.loss, under.loss)


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
    with pytest.raises(ValueError, match="one shape"):
        sigmoid_loss(images, texts[:-1], scale, scale)
    with pytest.raises(ValueError, match="tile"):
        contrastive_loss(images, texts, scale, tile=0)
