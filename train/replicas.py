"""Whether all processes still have the same weights: a flipped bit in one of them is found.

Processes that hold the whole model make equal updates from equal gradients, so a single bit in
which weights or optimiser differ means that memory or an arithmetic unit failed. Parts of a sharded
model have no replica to compare with; there is nothing to check then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import UserError
from train.distributed import Process

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicasDiffer(UserError):
    """Processes have different weights; another attempt goes on from the last checkpoint."""

    exit_code = 8


def can_be_compared(model: nn.Module, process: Process) -> bool:
    """Whether several processes hold the whole model."""
    if process.world == 1:
        return False
    from torch.distributed.tensor import DTensor  # half a second that one process need not wait

    return not any(isinstance(parameter, DTensor) for parameter in model.parameters())


@torch.no_grad()
def compare(
    model: nn.Module, optimizer: torch.optim.Optimizer, process: Process, step: int
) -> None:
    """Raise `ReplicasDiffer`, in all processes, naming those that differ from most of them."""
    named = dict(_replicated(model, optimizer))
    sums = checksums(list(named.values()))
    digests = _gather(checksums([sums]), process)[:, 0].tolist()
    if not (odd := odd_ranks(digests)):
        return
    all_sums = _gather(sums, process)
    differing = (all_sums != all_sums[:1]).any(0).tolist()
    where = [name for name, differs in zip(named, differing, strict=True) if differs]
    who = f"rank {odd[0]}" if len(odd) == 1 else f"ranks {', '.join(map(str, odd))}"
    verb = "differ from each other" if len(odd) == process.world else "differ from the others"
    raise ReplicasDiffer(
        f"step {step}: the weights of {who} {verb} in {', '.join(where[:3])}"
        f"{f' and {len(where) - 3} more' if len(where) > 3 else ''}: memory or processor of that "
        "machine is not to be trusted; training goes on from the last checkpoint"
    )


def odd_ranks(digests: Sequence[int]) -> list[int]:
    """The ranks whose digest is not that of more than half of all; all of them if there is none."""
    (common, count), *_ = Counter(digests).most_common(1)
    if count == len(digests):
        return []
    if 2 * count <= len(digests):
        return list(range(len(digests)))
    return [rank for rank, digest in enumerate(digests) if digest != common]


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """Of each tensor the sum of its elements' bits, read as integers: int64 [tensors].

    One flipped bit changes a sum by a power of two, whatever else is in it.
    """
    bits = (tensor.view(_INTEGER[tensor.element_size()]) for tensor in tensors)
    return torch.stack([part.sum(dtype=torch.int64) for part in bits])


def _replicated(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.device == parameter.device:
                yield f"{kind} of {name}", value


def _gather(row: Tensor, process: Process) -> Tensor:
    """The row of every process, [processes, values]."""
    rows = [torch.empty_like(row) for _ in range(process.world)]
    dist.all_gather(rows, row)
    return torch.stack(rows)
