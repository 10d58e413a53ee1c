"""Damage of every kind to a packed dataset, and who notices it.

`python -m tests.mutations FOLDER 10000` damages a copy of a run's pack/out so many times, in turns:
bits flipped, 4 KiB pages zeroed, 512 B blocks dropped, doubled and exchanged; and each file cut at
every 512 B. `verify` must notice all of it, and so must its structure and hashes without the
checksums of whole files. Training notices what it reads. With a run as FOLDER it damages every file
that the run has published, in all these ways, adds to it and deletes it, and asks the command.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

from dataset_build.verify import verify
from pipeline.__main__ import main as command
from train.data import storage
from train.data.index import DatasetError, open_dataset

BLOCK, PAGE = 512, 4096


def flip(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def zero(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(0, len(data), PAGE)
    data[start : start + PAGE] = bytes(len(data[start : start + PAGE]))


def drop(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(0, len(data), BLOCK)
    del data[start : start + BLOCK]


def double(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(0, len(data), BLOCK)
    data[start:start] = data[start : start + BLOCK]


def exchange(data: bytearray, draw: random.Random) -> None:
    one, other = sorted(draw.randrange(0, len(data) - BLOCK + 1, BLOCK) for _ in range(2))
    first, second = data[one : one + BLOCK], data[other : other + BLOCK]
    if len(first) == len(second) == BLOCK:
        data[one : one + BLOCK], data[other : other + BLOCK] = second, first


KINDS = (flip, zero, drop, double, exchange)


def mutations(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Every cut at 512 B, then `count` of the other kinds in turn; all differ from `data`."""
    for size in range(0, len(data), BLOCK):
        yield "cut", data[:size]
    draw = random.Random(seed)
    kinds = KINDS if len(data) > 2 * BLOCK else (flip,)
    for number in range(count):
        damage = kinds[number % len(kinds)]
        damaged = bytearray(data)
        while damaged == data:  # such as zeros that are zeroed
            damage(damaged, draw)
        yield damage.__name__, bytes(damaged)


def verify_notices(folder: Path) -> bool:
    return bool(verify(folder, decodes=False, workers=1))


def structure_notices(folder: Path) -> bool:
    """Headers, padding, end, index and the hashes of single files: no checksum of a whole shard."""
    shards = json.loads((folder / "dataset.json").read_text())["pairs_by_shard"]
    known = {f"shards/{shard['name']}": shard["sha256"] for shard in shards}
    faults = verify(folder, decodes=False, workers=1, known=known)
    # What the size alone tells is left out as well.
    return any("packed with" not in fault.what for fault in faults)


def training_notices(folder: Path) -> bool:
    """Whether an epoch over the dataset would meet the damage."""
    try:
        index = open_dataset(folder)
        for row in range(len(index)):
            address = index.shards[index.shard[row]]
            image, text = (
                storage.read(address, int(at[row]), int(size[row]), timeout_s=9)
                for at, size in (
                    (index.image_offset, index.image_bytes),
                    (index.text_offset, index.text_bytes),
                )
            )
            if not index.intact(row, image, text):
                return True
    except DatasetError:
        return True
    return False


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def grow(data: bytearray, draw: random.Random) -> None:
    data += draw.randbytes(draw.randrange(1, BLOCK))


KINDS_OF_RUNS = (flip, zero, cut, grow, None)
"""What befalls a file of a run; None: it is deleted."""


def published(run: Path) -> list[Path]:
    """Every file that the stages of a run have published, as builds read them."""
    return sorted(path for path in run.glob("*/store/**/*") if path.is_file())


def befall(path: Path, kind: Callable[..., None] | None, draw: random.Random) -> None:
    """Damage a published file, under all of its names."""
    if kind is None:
        stage = path.parents[path.parts[::-1].index("store")]
        same = [p for p in (stage / "out").rglob("*") if p.samefile(path)]
        for name in (path, *same):
            name.unlink()
        return
    whole = path.read_bytes()
    damaged = bytearray(whole)
    while damaged == whole:
        kind(damaged, draw)
    path.write_bytes(damaged)


def command_notices(run: Path) -> bool:
    """Whether the command says so, and leaves with the code for damage."""
    said = io.StringIO()
    with redirect_stdout(said):
        code = command(["verify", str(run), "--no-decode"])
    assert (code == 0) is said.getvalue().startswith("all "), said.getvalue()
    return code == 5


def told(done: int) -> None:
    """Say now and then how far a sweep is."""
    if done % 500 == 0:
        print(f"{done} mutations", file=sys.stderr, flush=True)


WITNESSES: dict[str, Callable[[Path], bool]] = {
    "verify": verify_notices,
    "structure": structure_notices,
    "training": training_notices,
}
Tally = Counter[tuple[str, str, str]]
"""(file, kind of damage, who noticed it, or `all`) -> times."""


def sweep(folder: Path, name: str, count: int, seed: int = 0) -> Tally:
    """Damage the file `name` of the dataset in `folder`, which is put right again."""
    path = folder / name
    whole = path.read_bytes()
    tally: Tally = Counter()
    for done, (kind, damaged) in enumerate(mutations(whole, count, seed), 1):
        path.write_bytes(damaged)
        tally[path.suffix, kind, "all"] += 1
        for who, notices in WITNESSES.items():
            if who != "structure" or path.suffix == ".tar":
                tally[path.suffix, kind, who] += notices(folder)
        told(done)
    path.write_bytes(whole)
    return tally


def sweep_run(source: Path, count: int) -> int:
    """Damage published files of a run in turns, each in every way at least once; those missed."""
    draw = random.Random(0)
    tally: Tally = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        names = [path.relative_to(source) for path in published(source)]
        cases = [(name, kind) for kind in KINDS_OF_RUNS for name in names]
        for number in range(max(count, len(cases))):
            name, kind = cases[number % len(cases)]
            subprocess.run(["cp", "-a", source, run], check=True)
            befall(run / name, kind, draw)
            what = kind.__name__ if kind else "delete"
            tally[name.suffix, what, "all"] += 1
            tally[name.suffix, what, "verify"] += command_notices(run)
            shutil.rmtree(run)
            told(number + 1)
    return summary(tally)


def main(source: Path, count: int) -> int:
    if (source / "stages.json").exists():
        return sweep_run(source, count)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "dataset"
        shutil.copytree(source, folder)
        assert not any(notices(folder) for notices in WITNESSES.values()), "damaged before"
        shards = sorted(path.relative_to(folder).as_posix() for path in folder.glob("shards/*"))
        tally: Tally = Counter()
        for name, part in ((shards[0], 0.6), ("index.parquet", 0.3), ("dataset.json", 0.1)):
            tally += sweep(folder, name, int(part * count))
    return summary(tally)


def summary(tally: Tally) -> int:
    """Print what was noticed; 1 if `verify` missed something."""
    kinds = sorted({key[:2] for key in tally})
    missed = 0
    for suffix, kind in kinds:
        times = tally[suffix, kind, "all"]
        missed += times - tally[suffix, kind, "verify"]
        asked = [who for who in WITNESSES if (suffix, kind, who) in tally]
        noticed = ", ".join(f"{who} {tally[suffix, kind, who]}" for who in asked)
        print(f"{suffix:9}{kind:9}{times:6} times; noticed by {noticed}")
    total = sum(times for key, times in tally.items() if key[2] == "all")
    print(f"{total} mutations, {missed} not noticed by verify")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
