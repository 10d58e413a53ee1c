"""The guard's decisions, from numbers alone."""

from __future__ import annotations

import json
import math
import random

import pytest

from train.guard import WINDOW, Guard, Incident, Memory, TrainingDiverged, Verdict
from train.settings import TrainSettings


def guard(**changes: object) -> Guard:
    settings = {"batch": 1024, "spike_steps": 4, "max_skipped_steps": 2, "max_rewinds": 2} | changes
    return Guard(TrainSettings.model_validate(settings))


def after(
    judge: Guard, losses: list[float], memory: Memory | None = None, first: int = 0
) -> Verdict:
    """The verdict on the last of these losses."""
    verdict = Verdict(memory or Memory())
    for step, loss in enumerate(losses, first):
        verdict = judge.judge(verdict.memory, step, loss, 1.0)
    return verdict


def usual(steps: int, level: float = 2.0, seed: int = 0) -> list[float]:
    dice = random.Random(seed)
    return [level + dice.gauss(0, 0.1) for _ in range(steps)]


def test_a_run_that_goes_well_is_left_alone() -> None:
    # From guessing down to a floor, with heavier tails than a normal distribution's.
    dice = random.Random(1)
    losses = [
        6.9 * math.exp(-step / 300) + 0.5 + 0.1 * dice.gauss(0, 1) ** 3 for step in range(900)
    ]
    verdict = Verdict(Memory())
    for step, loss in enumerate(losses):
        verdict = guard().judge(verdict.memory, step, loss, 1.0)
        assert not verdict.skip
        assert verdict.back_before is None
    assert len(verdict.memory.losses) == WINDOW


def test_what_is_not_finite_is_skipped_whether_loss_or_gradient() -> None:
    for loss, grad_norm in ((math.nan, 1.0), (2.0, math.inf), (math.inf, math.nan)):
        verdict = guard().judge(Memory(losses=(2.0,)), 5, loss, grad_norm)
        assert verdict.skip
        assert verdict.memory.losses == (2.0,)
        assert verdict.memory.skipped == (5,)
        assert verdict.incident is not None
        assert verdict.incident.what == "not finite"


def test_one_skip_too_many_within_the_window_goes_back_before_the_first() -> None:
    nan = math.nan
    assert after(guard(), [nan, 2.0, nan]).back_before is None
    assert after(guard(), [2.0, nan, 2.0, nan, nan]).back_before == 1
    # The first is out of the window when the third comes.
    assert after(guard(), [nan, nan, *usual(WINDOW - 2), nan]).back_before is None
    assert after(guard(), [nan, nan, *usual(WINDOW - 3), nan]).back_before == 0
    with pytest.raises(TrainingDiverged, match=r"3 losses or gradients .* lower train\.lr"):
        after(guard(rewind=False), [nan, nan, nan])


def test_a_passing_spike_is_recorded_with_its_worst_step_and_no_more() -> None:
    verdict = after(guard(), [*usual(30), 5.0, 9.0, 6.0])
    assert verdict.incident is None
    assert not verdict.memory.calm
    verdict = after(guard(), usual(1), verdict.memory, first=33)
    assert verdict.incident == Incident("spike", 31, 9.0, 1.0, 3)
    assert verdict.back_before is None
    assert verdict.memory.calm
    assert max(verdict.memory.losses) < 3  # what was unusual is not counted as usual


def test_a_lasting_spike_goes_back_to_some_time_before_its_first_step() -> None:
    losses = [*usual(30), 5.0, 9.0, 6.0, 5.0]
    verdict = after(guard(), losses)
    assert verdict.back_before == 26
    assert verdict.incident == Incident("spike", 31, 9.0, 1.0, 4)
    verdict = after(guard(rewind=False), losses)
    assert verdict.back_before is None
    assert verdict.incident == Incident("spike", 31, 9.0, 1.0, 4)


def test_a_model_that_has_collapsed_is_noticed_without_a_history() -> None:
    judge, memory = guard(), Memory()
    guessing = math.log(1024)
    for step in range(3):
        memory = judge.judge(memory, step, guessing, 1e-8).memory
    assert judge.judge(memory, 3, guessing, 1e-8).back_before == 0
    assert judge.judge(memory, 3, guessing, 0.3).back_before is None  # as at the start of training
    assert judge.judge(memory, 3, 0.01, 1e-8).back_before is None  # all is learnt
    # After a history of gradients of 1, a hundredth of that has vanished.
    learnt = after(judge, usual(30)).memory
    assert judge.judge(learnt, 30, guessing, 0.005).memory.spike is not None


def test_a_large_gradient_is_recorded_once_and_changes_nothing() -> None:
    memory = after(guard(), usual(30)).memory
    incidents = []
    for step in range(30, 40):
        verdict = guard().judge(memory, step, 2.0, 15.0)
        assert not verdict.skip
        assert verdict.back_before is None
        memory = verdict.memory
        incidents.append(verdict.incident)
    assert incidents == [Incident("gradient", 30, 2.0, 15.0)] + [None] * 9


def test_a_detour_passes_by_the_data_up_to_the_trouble() -> None:
    saved, now = Memory(losses=(2.0,), skipped=(18,)), Memory(skipped=(18, 27, 28))
    first = guard().detour(saved, now, back_to=20, step=28)
    assert [first.data_step(step) for step in (19, 20, 21, 30)] == [19, 29, 30, 39]
    assert first.losses == (2.0,)
    assert first.skipped == ()
    # Trouble again, after the same checkpoint and before another one is written.
    second = guard().detour(saved, first, back_to=20, step=24)
    assert second.data_step(20) == first.data_step(24) + 1 == 34
    # A checkpoint from before the first detour goes by both.
    earlier = guard().detour(saved, first, back_to=10, step=24)
    assert [earlier.data_step(step) for step in (9, 10, 20)] == [9, 34, 44]
    with pytest.raises(TrainingDiverged, match=r"again after 2 rewinds; lower train\.lr"):
        guard().detour(saved, second, back_to=20, step=40)


def test_a_memory_that_was_saved_decides_as_the_one_that_was_not() -> None:
    losses = [*usual(40), math.nan, *usual(10, seed=2), 7.0, 8.0, 7.0, 7.0]
    whole = after(guard(), losses)
    for cut in (0, 12, 41, 52, 54):
        memory = after(guard(), losses[:cut]).memory
        restored = Memory.from_json(json.loads(json.dumps(memory.to_json())))
        assert restored == memory
        assert after(guard(), losses[cut:], restored, first=cut) == whole
    assert whole.back_before == 47
    detoured = guard().detour(whole.memory, whole.memory, 40, 54)
    assert Memory.from_json(json.loads(json.dumps(detoured.to_json()))) == detoured
    assert Memory.from_json({}) == Memory()
