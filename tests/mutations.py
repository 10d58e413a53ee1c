"""Damage of every kind to a packed dataset, and who notices it.

`python -m tests.mutations FOLDER 10000` damages a copy of a run's pack/out so many times, in turns:
bits flipped, 4 KiB pages zeroed, 512 B blocks dropped, doubled and exchanged; and each file cut at
every 512 B. `verify` must notice all of it, and so must its structure and hashes without the
checksums of whole files. Training notices what it reads.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from dataset_build.verify import verify
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
    for kind, damaged in mutations(whole, count, seed):
        path.write_bytes(damaged)
        tally[path.suffix, kind, "all"] += 1
        for who, notices in WITNESSES.items():
            if who != "structure" or path.suffix == ".tar":
                tally[path.suffix, kind, who] += notices(folder)
    path.write_bytes(whole)
    return tally


def main(source: Path, count: int) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "dataset"
        shutil.copytree(source, folder)
        assert not any(notices(folder) for notices in WITNESSES.values()), "damaged before"
        shards = sorted(path.relative_to(folder).as_posix() for path in folder.glob("shards/*"))
        tally: Tally = Counter()
        for name, part in ((shards[0], 0.6), ("index.parquet", 0.3), ("dataset.json", 0.1)):
            tally += sweep(folder, name, int(part * count))
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
