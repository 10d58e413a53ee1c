"""`kill -9` of a trainer at random moments and while it saves; then it goes on.

By hand: `python -m tests.kill_training FOLDER --kills 100 --ranks 1`. Trainers are forked from this
process, which has torch loaded, and train CLIP with `train.loop` on a small packed dataset. Of
several ranks one is killed, drawn at random, and then those that it leaves behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.files import sha256
from pipeline.stage import Attempt, Run, Task
from pipeline.stop import StopFlag
from tests.train.conftest import TINY_MODEL, Config, _add
from tests.train.toy_training import Toy, alone
from train import loop
from train.settings import TrainSettings
from train.training_state import TrainingState

BATCH, MAX_LOST = 8, 20


@dataclass
class Tally:
    """What the kills did."""

    kills: int = 0
    while_saving: int = 0
    """Those that left a checkpoint half-written."""
    lost: list[int] = field(default_factory=list)
    """Steps that had to be done again after each kill."""


class Reporting(Attempt):
    """An attempt that writes every step's number to a pipe."""

    def progress(
        self, done: int, total: int | None = None, unit: str = "rows", note: str = ""
    ) -> None:
        os.write(self.pipe, (done // BATCH).to_bytes(4, "little"))

    pipe: int = -1


def pack(folder: Path, samples: int = 33) -> Path:
    """A packed dataset of one shard."""
    (folder / "shards").mkdir(parents=True)
    with tarfile.open(folder / "shards" / "00000.tar", "w:", format=tarfile.USTAR_FORMAT) as tar:
        rows = [_add(tar, "00000.tar", sample, None) for sample in range(samples)]
    rows.sort(key=lambda row: str(row["uid"]))
    pq.write_table(pa.Table.from_pylist(rows), folder / "index.parquet")
    (folder / "dataset.json").write_text(json.dumps({"fingerprint": f"{samples}"}))
    return folder


class Trainers:
    """The ranks of one training, forked; `out` is where the model comes."""

    def __init__(self, packed: Path, run: Path, steps: int, ranks: int) -> None:
        settings = {
            "samples": BATCH * steps,
            "batch": BATCH,
            "precision": "float32",
            "threads": 1,
            "log_every_steps": 5,
            "model": TINY_MODEL,
            "data": {"lanes": 4, "block_samples": 5, "workers": 1},
            "warmup_steps": 3,
            "checkpoint": {"max_lost_steps": MAX_LOST},
        }
        config = Config(train=TrainSettings.model_validate(settings))
        reads = [packed / "index.parquet", packed / "dataset.json", *packed.glob("shards/*.tar")]
        self.checkpoints = run / "train" / "checkpoints"
        self.out = run.with_name(f"{run.name}-{time.monotonic_ns()}")
        self._reads, writes = os.pipe()
        os.set_blocking(self._reads, False)
        port = _free_port()
        self.pids = []
        for rank in range(ranks):
            folder = self.out / str(rank)
            folder.mkdir(parents=True)
            if (pid := os.fork()) == 0:
                try:
                    if ranks > 1:
                        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
                        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                    task = Task("train", 0, tuple(map(str, reads)))
                    attempt = Reporting(Run(run, config), task, folder, StopFlag())
                    attempt.pipe = writes if rank == 0 else os.open(os.devnull, os.O_WRONLY)
                    sys.stderr = (self.out / f"{rank}.log").open("w")
                    loop.train(attempt)
                    os._exit(0)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    sys.stderr.flush()
                finally:
                    os._exit(1)
            self.pids.append(pid)
        os.close(writes)

    def steps(self) -> list[int]:
        """Steps done since the last time this was asked."""
        try:
            told = os.read(self._reads, 1 << 20)
        except BlockingIOError:
            return []
        return [int.from_bytes(told[at : at + 4], "little") for at in range(0, len(told), 4)]

    def running(self) -> bool:
        """Whether no rank has ended; raises if one failed."""
        for pid in self.pids:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) == 0, self._logs()
                for other in set(self.pids) - {pid}:
                    assert os.waitpid(other, 0)[1] == 0, self._logs()
                os.close(self._reads)
                return False
        return True

    def kill(self, dice: random.Random) -> list[int]:
        """SIGKILL to one rank, then to the others; the last steps that they did."""
        first = dice.choice(self.pids)
        os.kill(first, signal.SIGKILL)
        time.sleep(dice.uniform(0, 0.05) if len(self.pids) > 1 else 0)
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            os.waitpid(pid, 0)
        steps = self.steps()
        os.close(self._reads)
        return steps

    def wait(self) -> None:
        """Until all have ended; raises if one failed."""
        while self.running():
            self.steps()
            time.sleep(0.01)

    def _logs(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.out.glob("*.log")))


def disturbed(packed: Path, run: Path, steps: int, ranks: int, kills: int, seed: int) -> Tally:
    """Train to the end through `kills` kills, every second one aimed at a save."""
    dice = random.Random(seed)
    tally = Tally()
    reached: int | None = None  # by the trainer that was killed last
    while tally.kills < kills:
        trainers = Trainers(packed, run, steps, ranks)
        # A kill that is aimed waits for a save: none may come after the end.
        room = steps - (reached or 0) - MAX_LOST
        after_steps = dice.randrange(max(1, min(2 * MAX_LOST, room)))
        told = _kill(trainers, after_steps, dice, aimed=room > 0 and tally.kills % 2 == 1)
        assert told is not None, f"all steps were done before kill {tally.kills + 1}"
        tally.kills += 1
        tally.while_saving += any(trainers.checkpoints.glob(".step-*"))
        if told:
            resumed = told[0] - 1
            tally.lost += [] if reached is None else [max(0, reached - resumed)]
            reached = told[-1]
            print(f"kill {tally.kills}: from step {resumed} to {reached}", file=sys.stderr)
    return tally


def _kill(
    trainers: Trainers, after_steps: int, dice: random.Random, *, aimed: bool
) -> list[int] | None:
    """Kill after some steps, at the next save if `aimed`; the steps done, None if all are."""
    told: list[int] = []
    while trainers.running():
        told += trainers.steps()
        if len(told) >= after_steps:
            if not aimed or any(trainers.checkpoints.glob(".step-*")):
                time.sleep(dice.uniform(0, 0.02))
            else:
                time.sleep(0.0005)
                continue
            return told + trainers.kill(dice)
        time.sleep(0.0005)
    return None


def measure(folder: Path, *, kills: int, ranks: int, steps: int, seed: int = 0) -> Tally:
    """Kill, go on, compare with an undisturbed training; raises `AssertionError` if it differs."""
    torch.set_num_threads(1)
    _warm()
    packed = pack(folder / "packed")
    quiet = Trainers(packed, folder / "quiet", steps, ranks)
    quiet.wait()
    tally = disturbed(packed, folder / "loud", steps, ranks, kills, seed)
    last = Trainers(packed, folder / "loud", steps, ranks)
    last.wait()
    same = sha256(last.out / "0/model.safetensors") == sha256(quiet.out / "0/model.safetensors")
    assert same, "the final weights differ from those of the undisturbed training"
    left = sorted(path.name for path in last.checkpoints.iterdir())
    assert left == [f"step-{step:010d}" for step in (steps - MAX_LOST // 2, steps)], left
    assert max(tally.lost, default=0) <= MAX_LOST, tally
    return tally


def _warm() -> None:
    """Load what a step and a save need of torch, or each trainer would do so by itself."""
    import open_clip  # noqa: F401

    toy = Toy("plain", alone())
    toy.step(0)
    TrainingState(toy.net, toy.optimizer, alone()).copy()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    """Print what the kills cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tally = measure(
        options.folder,
        kills=options.kills,
        ranks=options.ranks,
        steps=options.steps,
        seed=options.seed,
    )
    lost = tally.lost or [0]
    print(f"{options.ranks} ranks, {options.steps} steps, of which a kill may cost {MAX_LOST}")
    print(f"{tally.kills} kills, {tally.while_saving} of them left a checkpoint half-written")
    print(f"steps lost to a kill: mean {sum(lost) / len(lost):.1f}, most {max(lost)};")
    print("final weights equal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
