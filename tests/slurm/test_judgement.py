"""What the batch script of a training makes of how its processes ended; needs bash alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from slurm.batches import Batch
from slurm.training import _choose, _judge


@pytest.mark.parametrize(
    ("ended", "stopped", "began", "saved", "judged"),
    [
        (0, False, "", "", 0),
        (0, True, "", "step-0000000010", 75),  # at a safe point: nobody failed
        (137, True, "step-0000000010", "step-0000000010", 75),
        (1, False, "", "", 1),  # failed without getting anywhere
        (1, False, "step-0000000010", "step-0000000010", 1),
        (1, False, "step-0000000010", "step-0000000020", 75),  # a node died, for one
        (137, False, "", "step-0000000020", 75),
        (7, False, "step-0000000010", "step-0000000020", 75),  # it hung
        (2, False, "step-0000000010", "step-0000000020", 2),  # another try would not help
        (5, False, "", "step-0000000020", 5),
        (9, False, "", "", 75),  # a lost node still trains
    ],
)
def test_what_is_queued_again(
    tmp_path: Path, ended: int, stopped: bool, began: str, saved: str, judged: int
) -> None:
    run = tmp_path / "a run's"
    batch = Batch(run / "slurm/train-00000.json", "train", "train.0", "0", [[]], 0.0)
    batch.folder.mkdir(parents=True)
    (run / "train/checkpoints/damaged").mkdir(parents=True)
    if saved:
        (run / "train/checkpoints" / saved).mkdir()
        (run / "train/checkpoints/step-0000000005").mkdir()
    (batch.folder / "0.began").write_text(began)
    if stopped:
        (batch.folder / "0.stopped").touch()
    script = "\n".join([f"(exit {ended})", *_judge(run / "train", batch), "exit $?"])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (judged, "")


def test_a_job_that_never_began_is_as_it_ended(tmp_path: Path) -> None:
    batch = Batch(tmp_path / "slurm/train-00000.json", "train", "train.0", "0", [[]], 0.0)
    script = "\n".join(["(exit 1)", *_judge(tmp_path / "train", batch), "exit $?"])
    assert subprocess.run(["bash", "-c", script], check=False).returncode == 1


@pytest.mark.parametrize(("has", "uses"), [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4)])
def test_of_the_nodes_that_it_has_a_job_uses_as_many_as_will_do(has: int, uses: int) -> None:
    lines = "\n".join([*_choose((1, 2, 4)), "echo $SLURM_NNODES"])
    environ = {"SLURM_JOB_NUM_NODES": str(has)}
    done = subprocess.run(
        ["bash", "-c", lines], env=environ, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == uses
