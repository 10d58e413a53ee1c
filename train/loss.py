"""The contrastive loss of CLIP, exact over any number of processes, in memory O(tile x batch).

Each process holds one slab of the similarity matrix: its own images against all texts. One pass
over the slab yields both softmax directions: rows are complete within a process, and of the columns
only their log-sum-exp travels. So images are never gathered, and no process computes a similarity
that another one has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, tile: int = 1024
) -> Tensor:
    """Mean over both directions of the cross entropy of `logit_scale * image @ text.T`.

    Features are normalised, [batch, width]; row i of both is a pair. `logit_scale` is the scalar
    multiplier, not its logarithm. Computed in float32 (float64 if that is what comes in), whatever
    autocast says. `tile` rows of the matrix exist at one time.

    In a process group of W, every process passes its part, of equal sizes, of one global batch. The
    value is that of the global batch; gradients are W times this process's part, so that their mean
    over processes, which data-parallel training takes, is the gradient of the global loss.
    """
    if image_features.shape != text_features.shape or image_features.ndim != 2:
        raise ValueError(
            f"features must be two [batch, width] matrices of one shape, not "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    if tile < 1:
        raise ValueError(f"tile must be at least 1, not {tile}")
    double = image_features.dtype == torch.float64
    precise = torch.float64 if double else torch.float32
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts = image_features.to(precise), text_features.to(precise)
        scale = torch.as_tensor(logit_scale, dtype=precise, device=images.device)
        loss: Tensor = _Contrastive.apply(images, texts, scale.reshape(()), tile)
    return loss


class _Contrastive(torch.autograd.Function):
    """Forms the gradients along with the value: a tile is then needed only while it exists."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, tile: int) -> Tensor:
        world = dist.get_world_size() if dist.is_initialized() else 1
        local = len(images)
        first = dist.get_rank() * local if world > 1 else 0
        all_texts = _gather(texts, world)
        batch = len(all_texts)
        starts = range(0, local, tile)

        rows = images.new_empty(local)
        columns = images.new_full((batch,), float("-inf"))
        kept: Tensor | None = None
        for start in starts:
            logits = (images[start : start + tile] * scale) @ all_texts.T
            rows[start : start + tile] = logits.logsumexp(1)
            columns = torch.logaddexp(columns, logits.logsumexp(0))
            kept = logits if len(starts) == 1 else None
        if world > 1:
            columns = _gather(columns[None], world).logsumexp(0)
        matched = (images * texts).sum(1) * scale
        loss = (rows - matched).sum() + (columns[first : first + local] - matched).sum()
        if world > 1:
            dist.all_reduce(loss)

        if any(ctx.needs_input_grad):
            grad_images = torch.empty_like(images)
            grad_texts = torch.zeros_like(all_texts)
            for start in starts:
                part = images[start : start + tile]
                logits = (part * scale) @ all_texts.T if kept is None else kept
                # d(loss)/d(logit): both softmaxes, less 1 on the diagonal for each direction.
                pull = torch.exp(logits - rows[start : start + tile, None])
                pull += logits.sub_(columns).exp_()
                pull.diagonal(first + start).sub_(2)
                grad_images[start : start + tile] = pull @ all_texts
                grad_texts.addmm_(pull.T, part)
            grad_scale = (images * grad_images).sum()
            if world > 1:
                grad_texts = _scatter_sum(grad_texts, local, first)
            # Of the global mean, 1 / (2 batch); W times that, see `contrastive_loss`.
            factor = world / (2 * batch)
            ctx.save_for_backward(
                grad_images * (scale * factor), grad_texts * (scale * factor), grad_scale * factor
            )
        return loss / (2 * batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        images, texts, scale = ctx.saved_tensors
        return grad * images, grad * texts, grad * scale, None


def _gather(part: Tensor, world: int) -> Tensor:
    """The parts of all processes, concatenated in the order of their ranks."""
    if world == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(world)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def _scatter_sum(whole: Tensor, local: int, first: int) -> Tensor:
    """This process's rows of the sum over processes."""
    if dist.get_backend() == "nccl":
        part = whole.new_empty((local, *whole.shape[1:]))
        dist.reduce_scatter_tensor(part, whole)
        return part
    dist.all_reduce(whole)
    return whole[first : first + local]
