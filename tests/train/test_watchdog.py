"""The watchdog: who is to blame, and that nobody is blamed too early."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train import recipe
from train.watchdog import PATIENCE, Beat, Heart, Hung, Phase, Watch, beat_path

RUNNING = Beat(pid=1, lap=7, phase=Phase.REDUCE, step=40)


class Clock:
    """Beats of several ranks as time goes by; every rank has a pulse unless it is stopped."""

    def __init__(self, world: int, timeout_s: float = 10) -> None:
        self.watch = Watch(Path("nowhere"), world, timeout_s)
        self.now = max(self.watch._moved)
        self.pulse = 0

    def passes(
        self, seconds: float, beats: list[Beat], stopped: tuple[int, ...] = ()
    ) -> str | None:
        """What is said after a time during which the beats stay as they are."""
        said = None
        for _ in range(int(seconds)):
            self.now += 1
            self.pulse += 1
            seen = [
                b if r in stopped else replace(b, pulse=self.pulse) for r, b in enumerate(beats)
            ]
            said = self.watch.judge(seen, self.now)
        return said


def test_who_is_behind_the_others_is_stuck() -> None:
    clock = Clock(3)
    behind = replace(RUNNING, phase=Phase.DATA)
    assert clock.passes(10, [RUNNING, behind, RUNNING]) is None
    said = clock.passes(2, [RUNNING, behind, RUNNING])
    assert said is not None
    assert "nothing has moved for 11 s" in said
    assert "rank 1 is stuck in data of step 40 (pid 1): it is behind the others" in said
    assert said.count("waits in reduce of step 40") == 2


def test_a_step_behind_counts_more_than_a_phase_ahead() -> None:
    before = replace(RUNNING, lap=6, phase=Phase.WAIT, step=39)
    said = Clock(2).passes(70, [replace(RUNNING, phase=Phase.DATA), before])
    assert said is not None
    assert "rank 1 is stuck in waiting for the others of step 39" in said
    assert "rank 0 is stuck" not in said


def test_after_a_rewind_laps_tell_who_is_behind() -> None:
    rewound = replace(RUNNING, lap=8, phase=Phase.DATA, step=10)
    said = Clock(2).passes(12, [rewound, RUNNING])
    assert said is not None
    assert "rank 1 is stuck" in said
    assert "rank 0 waits" in said


def test_who_has_no_pulse_is_stopped_wherever_it_stands() -> None:
    clock = Clock(2)
    assert clock.passes(3, [replace(RUNNING, lap=6), replace(RUNNING, lap=6)]) is None
    said = clock.passes(12, [RUNNING, RUNNING], stopped=(0,))
    assert said is not None
    assert "rank 0 is stuck in reduce of step 40 (pid 1): its process is stopped" in said
    assert "rank 1 waits" in said


def test_any_movement_of_anyone_is_enough() -> None:
    clock = Clock(2)
    for lap in range(7, 40):
        assert clock.passes(9, [RUNNING, replace(RUNNING, lap=lap)]) is None
    # Both stand at one place: nobody is singled out without evidence.
    said = clock.passes(12, [RUNNING, RUNNING])
    assert said is not None
    assert said.count("is stuck in reduce of step 40 (pid 1): no one is behind it") == 2


@pytest.mark.parametrize(
    "beat",
    [
        Beat(),
        replace(RUNNING, lap=1, phase=Phase.COMPUTE),
        replace(RUNNING, phase=Phase.SAVE),
        replace(RUNNING, phase=Phase.WAIT),
    ],
)
def test_the_first_step_and_checkpoints_may_take_longer(beat: Beat) -> None:
    clock = Clock(1)
    assert clock.passes(10 * PATIENCE - 1, [beat]) is None
    assert clock.passes(2, [beat]) is not None


def test_a_heart_says_where_it_is_and_when_it_failed(tmp_path: Path) -> None:
    path = beat_path(tmp_path, 3)
    with Heart(tmp_path, 3, timeout_s=1) as heart:
        heart.enter(Phase.DATA, 12)
        heart.enter(Phase.REDUCE, 12)
        beat = Beat.read(path)
        assert (beat.lap, beat.phase, beat.step) == (1, Phase.REDUCE, 12)
        assert beat.pid > 0
    assert Beat.read(path).failed_at == 0
    with pytest.raises(ValueError, match="as asked"), Heart(tmp_path, 3, timeout_s=1):
        raise ValueError("as asked")
    assert Beat.read(path).failed_at > 0
    path.write_bytes(b"torn")
    assert Beat.read(path) == Beat()


def test_processes_that_watch_each_other_end_with_their_stacks(tmp_path: Path) -> None:
    # As under torchrun and srun: nobody but the processes themselves looks at the hearts.
    script = f"""
        import time
        from pathlib import Path
        from train.watchdog import Heart, Phase
        with Heart(Path({str(tmp_path)!r}), 0, timeout_s=1) as heart:
            heart.watch(2)
            for step in range(5):
                heart.enter(Phase.DATA, step)
            def stuck_here():
                time.sleep(60)
            stuck_here()
    """
    other = Heart(tmp_path, 1, timeout_s=1)  # without a pulse, as if it were stopped
    for step in range(3):
        other.enter(Phase.DATA, step)
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=recipe.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == Hung.exit_code
    assert "stuck_here" in ended.stderr
    assert "rank 1 is stuck in data of step 2" in ended.stderr
    assert "rank 0 waits in data of step 4" in ended.stderr
