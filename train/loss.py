"""The losses of CLIP and SigLIP, exact over any number of processes.

CLIP's takes memory O(tile x batch). Each process holds one slab of the similarity matrix: its own
images against all texts. One pass over the slab yields both softmax directions: rows are complete
within a process, and of the columns only their log-sum-exp and maximum travel. So images are never
gathered, and no process computes a similarity that another one has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

PairBias = Callable[[int, int], Tensor]
"""(start, stop) -> logarithms of pair weights, [stop - start, batch], for these images of the
global batch and all its texts. They are added to the logits, in both directions: log(0.5) makes a
pair half as much of a negative, -inf none at all. They are constants, and 0 for an image's own
text."""


class Measured(NamedTuple):
    """A loss to go backward from, and what the same similarities say about the global batch."""

    loss: Tensor
    """Scalar; equal in all processes."""
    by_direction: Tensor
    """[2]: the loss from image to text and from text to image, which it is the mean of."""
    accuracy: Tensor
    """[2]: share of images whose own text is nearer than every other one, and of texts whose own
    image is. A tie is no hit."""


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    tile: int = 1024,
    bias: PairBias | None = None,
) -> Tensor:
    """Mean over both directions of the cross entropy of `logit_scale * image @ text.T`.

    The loss of `contrast`, which see.
    """
    return contrast(image_features, text_features, logit_scale, tile=tile, bias=bias).loss


def contrast(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    tile: int = 1024,
    bias: PairBias | None = None,
) -> Measured:
    """CLIP's loss (figure 3 of the paper), by direction too, and the accuracy within the batch.

    Features are normalised, [batch, width]; row i of both is a pair. `logit_scale` is the scalar
    multiplier, not its logarithm. Computed in float32 (float64 if that is what comes in), whatever
    autocast says. `tile` rows of the matrix exist at one time; `bias` is asked for as many.

    In a process group of W, every process passes its part, of equal sizes, of one global batch.
    What comes back is that of the global batch; gradients are W times this process's part, so that
    their mean over processes, which data-parallel training takes, is that of the global loss.
    """
    _check_features(image_features, text_features)
    if tile < 1:
        raise ValueError(f"tile must be at least 1, not {tile}")
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts = _precise(image_features), _precise(text_features)
        scale = torch.as_tensor(logit_scale, dtype=images.dtype, device=images.device)
        loss, figures = _Contrastive.apply(images, texts, scale.reshape(()), tile, bias)
    return Measured(loss, figures[:2], figures[2:])


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    tile: int = 1024,
) -> Measured:
    """SigLIP's loss (Zhai et al., "Sigmoid Loss for Language Image Pre-Training"), open_clip's.

    Arguments, processes and gradients as in `contrast`. It has no directions, so both are the loss.
    open_clip holds the similarities of this process's images and one process's texts at a time;
    `tile` is for the accuracy.
    """
    from open_clip.loss import SigLipLoss

    _check_features(image_features, text_features)
    world = _world()
    objective = SigLipLoss(rank=dist.get_rank() if world > 1 else 0, world_size=world)
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts = _precise(image_features), _precise(text_features)
        part = objective(images, texts, logit_scale, logit_bias)
    # open_clip divides by the local batch: the mean over processes is the global loss already.
    whole = part.detach().clone()
    if world > 1:
        dist.all_reduce(whole)
        whole /= world
    with torch.no_grad():
        accuracy = contrast(images, texts, logit_scale, tile=tile).accuracy
    return Measured(part + (whole - part).detach(), whole.expand(2), accuracy)


class _Contrastive(torch.autograd.Function):
    """Forms the gradients along with the value: a tile is then needed only while it exists."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, tile: int, bias: PairBias | None
    ) -> tuple[Tensor, Tensor]:
        world = _world()
        local = len(images)
        first = dist.get_rank() * local if world > 1 else 0
        all_texts = _gather(texts, world)
        batch = len(all_texts)
        tiles = [slice(start, min(start + tile, local)) for start in range(0, local, tile)]

        def logits_of(rows: slice) -> Tensor:
            logits = (images[rows] * scale) @ all_texts.T
            return (
                logits if bias is None else logits.add_(bias(first + rows.start, first + rows.stop))
            )

        # Of each row: its log-sum-exp, its largest logit but for the pair's own, and that one.
        row_lse, row_rival, own = (images.new_empty(local) for _ in range(3))
        lowest = float("-inf")
        column_lse, column_rival = (images.new_full((batch,), lowest) for _ in range(2))
        kept: Tensor | None = None
        for rows in tiles:
            logits = logits_of(rows)
            diagonal = logits.diagonal(first + rows.start)
            own[rows] = diagonal
            diagonal.fill_(lowest)
            row_rival[rows] = logits.amax(1)
            top = logits.amax(0)
            torch.maximum(column_rival, top, out=column_rival)
            diagonal.copy_(own[rows])
            row_lse[rows] = _logsumexp(logits, torch.maximum(row_rival[rows], own[rows]), 1)
            matching = top[first + rows.start : first + rows.stop]
            torch.maximum(matching, own[rows], out=matching)
            column_lse = torch.logaddexp(column_lse, _logsumexp(logits, top, 0))
            kept = logits if len(tiles) == 1 else None
        if world > 1:
            parts = _gather(torch.stack([column_lse, column_rival])[None], world)
            column_lse, column_rival = parts[:, 0].logsumexp(0), parts[:, 1].amax(0)
        mine = slice(first, first + local)
        figures = torch.stack(
            [
                (row_lse - own).sum(),
                (column_lse[mine] - own).sum(),
                (own > row_rival).sum(),
                (own > column_rival[mine]).sum(),
            ]
        )
        if world > 1:
            dist.all_reduce(figures)
        figures /= batch

        if any(ctx.needs_input_grad):
            grad_images = torch.empty_like(images)
            grad_texts = torch.zeros_like(all_texts)
            for rows in tiles:
                logits = logits_of(rows) if kept is None else kept
                # d(loss)/d(logit): both softmaxes, less 1 on the diagonal for each direction.
                pull = torch.sub(logits, row_lse[rows, None]).exp_()
                pull += logits.sub_(column_lse).exp_()
                pull.diagonal(first + rows.start).sub_(2)
                torch.mm(pull, all_texts, out=grad_images[rows])
                grad_texts.addmm_(pull.T, images[rows])
            grad_scale = (images * grad_images).sum()
            if world > 1:
                grad_texts = _scatter_sum(grad_texts, local, first)
            # Of the global mean, 1 / (2 batch); W times that, see `contrast`.
            factor = world / (2 * batch)
            ctx.save_for_backward(
                grad_images.mul_(scale * factor), grad_texts * (scale * factor), grad_scale * factor
            )
        ctx.mark_non_differentiable(figures)
        return figures[:2].mean(), figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        images, texts, scale = ctx.saved_tensors
        return grad * images, grad * texts, grad * scale, None, None


def _check_features(images: Tensor, texts: Tensor) -> None:
    if images.shape != texts.shape or images.ndim != 2:
        raise ValueError(
            f"features must be two [batch, width] matrices of one shape, not "
            f"{tuple(images.shape)} and {tuple(texts.shape)}"
        )


def _precise(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _logsumexp(logits: Tensor, top: Tensor, dim: int) -> Tensor:
    """Given the maxima, in one temporary; -inf where all are."""
    top = top.clamp(min=torch.finfo(top.dtype).min)
    return torch.sub(logits, top.unsqueeze(dim)).exp_().sum(dim).log_().add_(top)


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(part: Tensor, world: int) -> Tensor:
    """The parts of all processes, concatenated in the order of their ranks."""
    if world == 1:
        return part
    whole = part.new_empty((world * len(part), *part.shape[1:]))
    dist.all_gather(list(whole.chunk(world)), part.contiguous())
    return whole


def _scatter_sum(whole: Tensor, local: int, first: int) -> Tensor:
    """This process's rows of the sum over processes."""
    if dist.get_backend() == "nccl":
        part = whole.new_empty((local, *whole.shape[1:]))
        dist.reduce_scatter(part, list(whole.split(local)))
        return part
    dist.all_reduce(whole)
    return whole[first : first + local]
