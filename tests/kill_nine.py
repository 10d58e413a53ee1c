"""`kill -9` of a whole run at random moments, the same command again, and a comparison at the end.

Run by hand for the long measurement: `python -m tests.kill_nine CONFIG FOLDER --kills 10 a.b=c`
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.files import sha256

ROOT = Path(__file__).parent.parent
COMPARED = (
    "balance/out/tau.npy",
    "balance/out/counts.npy",
    "pack/out/shards/*.tar",
    "pack/out/index.parquet",
    "pack/out/dataset.json",
    "train/out/model.safetensors",
)


def command(what: str, config: Path, run: Path, overrides: Sequence[str]) -> list[str]:
    """The command line of one pipeline command."""
    return [sys.executable, "-m", "pipeline", what, str(config), "--run", str(run), *overrides]


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of every file that must not depend on how often the run was killed."""
    paths = [path for pattern in COMPARED for path in sorted(run.glob(pattern))]
    return {path.relative_to(run).as_posix(): sha256(path) for path in paths}


def undisturbed(
    what: str, config: Path, run: Path, overrides: Sequence[str]
) -> tuple[dict[str, str], float]:
    """Run a command to its end; digests and wall seconds."""
    began = time.monotonic()
    subprocess.run(command(what, config, run, overrides), cwd=ROOT, check=True)
    return digests(run), time.monotonic() - began


def disturbed(
    what: str,
    config: Path,
    run: Path,
    overrides: Sequence[str],
    *,
    kills: int,
    within_s: float,
    seed: int,
) -> dict[str, str]:
    """Kill a command `kills` times, each at a random moment, then let it end; its digests."""
    dice = random.Random(seed)
    for number in range(kills):
        process = subprocess.Popen(command(what, config, run, overrides), cwd=ROOT)
        try:
            process.wait(timeout=dice.uniform(0.5, within_s))
        except subprocess.TimeoutExpired:
            pass
        done = process.poll()
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = wait_for_orphans(process.pid)
        assert not left, f"processes outlived the run: {left}"
        word = f"ended by itself with {done}" if done is not None else "killed"
        print(f"kill {number + 1}/{kills}: {word}", file=sys.stderr)
        assert done in (None, 0), f"{what} failed with exit code {done}"
    return undisturbed(what, config, run, overrides)[0]


def wait_for_orphans(parent: int, patience_s: float = 5.0) -> list[int]:
    """Processes that a dead run started and that are still there after `patience_s`."""
    until = time.monotonic() + patience_s
    while (left := _started_by(parent)) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def _started_by(parent: int) -> list[int]:
    mark = f"OPENWIT_PARENT={parent}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def main() -> int:
    """Measure: `kills` kills of the build and as many of the training, against a quiet run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    quiet, loud = options.folder / "quiet", options.folder / "loud"
    for what in ("build", "train"):
        expected, took = undisturbed(what, options.config, quiet, options.overrides)
        found = disturbed(
            what,
            options.config,
            loud,
            options.overrides,
            kills=options.kills,
            within_s=max(2.0, 1.5 * took / options.kills),  # so that all fall before the end
            seed=options.seed,
        )
        differing = {name for name in expected | found if expected.get(name) != found.get(name)}
        print(f"{what}: {took:.0f} s undisturbed, {len(expected)} files compared,"
              f" {len(differing)} differ {sorted(differing)}")  # fmt: skip
        if differing:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
