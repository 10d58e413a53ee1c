"""What to do when the numbers go wrong: leave the step out, go on, go back, or give up.

Decisions are functions of numbers that all processes have alike and of a memory that travels in the
checkpoint, so all processes decide alike, and alike again after a stop. Nothing here loads torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

from pipeline.config import UserError
from train.settings import TrainSettings

WINDOW = 100
"""Steps whose losses and gradients say what is usual, and within which skipped steps count."""
_HISTORY = 20  # steps before anything counts as unusual
_SIGMAS = 8.0
_GRADIENT = 10.0
_VANISHED = 1e-5
_ADVICE = "lower train.lr, lengthen train.warmup_steps, or set train.clip_gradients"


class TrainingDiverged(UserError):
    """The numbers went wrong and stay wrong; the same again would end the same way."""

    exit_code = 5


@dataclass(frozen=True)
class Spike:
    """Steps running whose loss stands far above what was usual before the first of them, or is that
    of guessing with no gradient to get away from it."""

    since: int
    steps: int
    worst: int
    """The step with the highest loss."""
    loss: float
    grad_norm: float
    """Loss and gradient norm of that step."""


@dataclass(frozen=True)
class Incident:
    """Something to be recorded, with the step that tells most about it."""

    what: Literal["not finite", "spike", "gradient"]
    step: int
    loss: float
    grad_norm: float
    steps: int = 1
    """How many steps it lasted."""


@dataclass(frozen=True)
class Memory:
    """What the guard remembers between steps."""

    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    skipped: tuple[int, ...] = ()
    """Steps left out, of the last `WINDOW`."""
    spike: Spike | None = None
    detours: tuple[tuple[int, int], ...] = ()
    """(step, offset) for each rewind: from that step on, data is that of the step plus offset."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Memory:
        """Inverse of `to_json`; of nothing, a new memory."""
        if not values:
            return cls()
        return cls(
            tuple(values["losses"]),
            tuple(values["grad_norms"]),
            tuple(values["skipped"]),
            Spike(**values["spike"]) if values["spike"] else None,
            tuple((step, offset) for step, offset in values["detours"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def data_step(self, step: int) -> int:
        """The step in the order of samples whose batch belongs to a step of training."""
        return step + next((by for start, by in reversed(self.detours) if step >= start), 0)

    @property
    def calm(self) -> bool:
        """Whether the weights are worth a checkpoint: no spike is going on."""
        return self.spike is None


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step."""

    memory: Memory
    skip: bool = False
    """Whether its update is left out."""
    back_before: int | None = None
    """If training must go back: the step before which it was well."""
    incident: Incident | None = None


class Guard:
    """Judges every step."""

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings
        self._guessing = math.log(settings.batch)

    def judge(self, memory: Memory, step: int, loss: float, grad_norm: float) -> Verdict:
        """Decide on a step from its loss and gradient norm. Raises `TrainingDiverged`."""
        recent = tuple(s for s in memory.skipped if s > step - WINDOW)
        memory = replace(memory, skipped=recent)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._skip(memory, step, loss, grad_norm)
        if _is_high(memory.losses, loss) or self._has_collapsed(memory, loss, grad_norm):
            return self._high(memory, step, loss, grad_norm)
        incident = None
        if (spike := memory.spike) is not None:
            incident = Incident("spike", spike.worst, spike.loss, spike.grad_norm, spike.steps)
        elif _is_large(memory.grad_norms, grad_norm):
            incident = Incident("gradient", step, loss, grad_norm)
        losses = (*memory.losses, loss)[-WINDOW:]
        grad_norms = (*memory.grad_norms, grad_norm)[-WINDOW:]
        memory = replace(memory, losses=losses, grad_norms=grad_norms, spike=None)
        return Verdict(memory, incident=incident)

    def detour(self, saved: Memory, now: Memory, back_to: int, step: int) -> Memory:
        """The memory to go on with from a checkpoint at `back_to`, after trouble up to `step`.

        `saved` is the checkpoint's, `now` the present one. Raises `TrainingDiverged` if training
        has gone back too often already.
        """
        rewinds = len(now.detours)
        if rewinds >= self._settings.max_rewinds:
            raise TrainingDiverged(
                f"step {step}: the loss or its gradient went wrong again after {rewinds} rewinds; "
                f"{_ADVICE}; RUN/train/incidents.jsonl lists the batches"
            )
        offset = now.data_step(step) + 1 - back_to
        return replace(saved, skipped=(), spike=None, detours=(*now.detours, (back_to, offset)))

    def _skip(self, memory: Memory, step: int, loss: float, grad_norm: float) -> Verdict:
        memory = replace(memory, skipped=(*memory.skipped, step))
        back = None
        if len(memory.skipped) > self._settings.max_skipped_steps:
            if not self._settings.rewind:
                raise TrainingDiverged(
                    f"step {step}: {len(memory.skipped)} losses or gradients of the last {WINDOW} "
                    f"steps were not finite; {_ADVICE}"
                )
            back = memory.skipped[0]
        incident = Incident("not finite", step, loss, grad_norm)
        return Verdict(memory, skip=True, back_before=back, incident=incident)

    def _high(self, memory: Memory, step: int, loss: float, grad_norm: float) -> Verdict:
        spike = memory.spike or Spike(step, 0, step, loss, grad_norm)
        spike = replace(spike, steps=spike.steps + 1)
        if loss > spike.loss:
            spike = replace(spike, worst=step, loss=loss, grad_norm=grad_norm)
        if spike.steps < self._settings.spike_steps:
            return Verdict(replace(memory, spike=spike))
        incident = Incident("spike", spike.worst, spike.loss, spike.grad_norm, spike.steps)
        if self._settings.rewind:
            memory = replace(memory, spike=spike)
            # What raised the loss came before it could be seen.
            before = max(0, spike.since - self._settings.spike_steps)
            return Verdict(memory, back_before=before, incident=incident)
        # It has become the usual: judge by what comes from here on.
        return Verdict(replace(memory, losses=(), spike=None), incident=incident)

    def _has_collapsed(self, memory: Memory, loss: float, grad_norm: float) -> bool:
        """Whether all pictures or all texts have one feature, as after far too large a step.

        Then the loss is that of guessing, and hardly any gradient leads away from it.
        """
        guesses = abs(loss - self._guessing) < 0.001 * self._guessing
        usual = median(memory.grad_norms) if memory.grad_norms else 0.0
        return guesses and grad_norm < max(_VANISHED, usual / 100)


def _is_high(losses: Sequence[float], loss: float) -> bool:
    """Whether a loss stands above the median of those before it by many deviations.

    Deviation: 1.4826 times the median absolute one, which is sigma of a normal distribution, but at
    least a twentieth of the median, since a loss that hardly moves has none.
    """
    if len(losses) < _HISTORY:
        return False
    middle = median(losses)
    sigma = 1.4826 * median(abs(value - middle) for value in losses)
    return loss > middle + _SIGMAS * max(sigma, middle / 20)


def _is_large(grad_norms: Sequence[float], grad_norm: float) -> bool:
    """The first of gradients far larger than usual. Recorded only: gradients also grow for good."""
    if len(grad_norms) < _HISTORY:
        return False
    limit = _GRADIENT * median(grad_norms)
    return grad_norm > limit >= grad_norms[-1]
