"""Gradients of a batch that is too large for the towers, exactly (Gao et al., "Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup").

The loss needs all features, but the towers only their own pairs. So features come first, chunk by
chunk and without graphs; then the loss, once, with its gradients by feature; then every chunk
again, with the random numbers of its first pass, to carry them to the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from train.loss import Measured
from train.parallel import Towers, frozen_statistics

Objective = Callable[..., Measured]
"""Image features, text features and the model's scalars to a loss."""


def backward(
    towers: Towers, image: Tensor, tokens: Tensor, objective: Objective, chunk: int
) -> Measured:
    """Add the loss's gradients to the parameters'; returns what was measured, the loss detached.

    Pairs go through the towers `chunk` at a time; one chunk does so once. Batch normalisation sees
    one chunk at a time, and updates its running statistics in the second pass only.
    """
    parts = list(zip(image.split(chunk), tokens.split(chunk), strict=True))
    if len(parts) == 1:
        outputs = towers.forward(image, tokens)
        measured, gradients = _differentiate(objective, outputs)
        towers.backward(outputs, gradients)
        return measured

    states, features = [], []
    with torch.no_grad(), frozen_statistics(towers.net):
        for part in parts:
            states.append(_random_state(towers.device))
            features.append(towers.forward(*part))
    images, texts, *scalars = zip(*features, strict=True)
    measured, gradients = _differentiate(
        objective, (torch.cat(images), torch.cat(texts), *(scalar[0] for scalar in scalars))
    )
    by_chunk = zip(*(gradient.split(chunk) for gradient in gradients[:2]), strict=True)
    for number, (part, state, pulls) in enumerate(zip(parts, states, by_chunk, strict=True), 1):
        _set_random_state(state, towers.device)
        last = number == len(parts)
        with nullcontext() if last else towers.unsynchronised():
            outputs = towers.forward(*part)
            # The scalars' gradients are whole already: they go along with the last chunk's.
            wanted = (*pulls, *gradients[2:]) if last else pulls
            towers.backward(outputs[: len(wanted)], wanted)
    return measured


def _differentiate(
    objective: Objective, outputs: tuple[Tensor, ...]
) -> tuple[Measured, tuple[Tensor, ...]]:
    """The loss of these features and scalars, and its gradients by them."""
    leaves = [output.detach().requires_grad_() for output in outputs]
    measured = objective(*leaves)
    gradients = torch.autograd.grad(measured.loss, leaves)
    return measured._replace(loss=measured.loss.detach()), gradients


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
