"""`python -m tests.purge_many FOLDER [PAIRS] [REMOVALS]`: remove many, look for them everywhere.

Half of them are asked for by address, the rest by domain, digest and uid. Prints one line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dataset_build import purge, removal, removed
from pipeline import files, tar
from tests.dataset_build.published_build import Web, run_in
from train.data.index import open_dataset
from train.data.removed import Removed


def main(folder: Path, pairs: int = 100_000, removals: int = 1_000) -> None:
    """Build, remove, measure, and assert that nothing is left."""
    web = Web(pairs, parts=10, domains=pairs // 10)
    run = run_in(folder / "run", pairs_per_shard=10_000)
    web.build(run)
    chosen = random.Random(0).sample(range(pairs), removals)
    list_ = folder / "list.txt"
    list_.write_text("\n".join(_entries(web, chosen)))

    began = time.perf_counter()
    request = removal.ask(run, removal.read([list_]))
    purge.show_uids(run.folder)
    in_force_s = time.perf_counter() - began
    executor = web.build(run_in(folder / "run", pairs_per_shard=10_000))
    all_s = time.perf_counter() - began

    listed = Removed([str(folder / "run/removed/[0-9]*/uids.txt")], timeout_s=9, every_s=0)
    gone = set(removed.uids(run.folder))
    assert len(gone) >= removals
    assert len(listed) == len(gone)
    index = open_dataset(folder / "run/pack/out")
    assert len(index) == pairs - len(gone)
    assert not any(index.uid[row] in listed for row in range(len(index)))
    in_tars = set()
    for path in (folder / "run/pack/out/shards").iterdir():
        with tar.opened(path) as opened:
            in_tars |= {m.name.partition(".")[0] for m in tar.members(opened, canonical=True)}
    assert in_tars == {index.name(row) for row in range(len(index))}
    numbers = {web.uid(number).hex(): number for number in range(pairs)}
    marks = {hashlib.sha256(str(web.file(numbers[uid])).encode()).digest() for uid in gone}
    held = {web.file(number) for uid, number in numbers.items() if uid not in gone}
    marks -= {hashlib.sha256(str(number).encode()).digest() for number in held}
    holding = sum(_holds(path, marks) for path in files.walk(folder / "run"))
    assert holding == 0, f"{holding} files hold pictures that were removed"
    again = web.build(run_in(folder / "run", pairs_per_shard=10_000))
    assert not again.ran
    result = {
        "pairs": pairs,
        "entries": removals,
        "removed": len(gone),
        "found": dict(request.found),
        "in_force_s": round(in_force_s, 2),
        "all_s": round(all_s, 2),
        "removals_an_hour": round(len(gone) / all_s * 3600),
        "tasks": len(executor.ran),
        "pictures_looked_for": len(marks),
        "files_that_hold_one": holding,
    }
    print(json.dumps(result))


def _entries(web: Web, chosen: list[int]) -> Iterator[str]:
    for place, number in enumerate(chosen):
        kind = place % 6
        if kind == 3:
            yield web.sent(number).hex()
        elif kind == 4:
            yield web.uid(number).hex()
        elif kind == 5 and place < 60:
            yield web.url(number).split("/")[2]
        else:
            yield web.url(number)


def _holds(path: Path, marks: set[bytes]) -> bool:
    """Whether a tar holds one of these pictures: each ends with 32 bytes of its own."""
    if path.suffix == ".parquet":
        return False  # no picture is in a table
    if path.suffix != ".tar":
        data = path.read_bytes()
        return len(data) < 1 << 24 and any(mark in data for mark in marks)
    with tar.opened(path) as opened:
        ends = {bytes(opened.read(m.offset, m.size)[-32:]) for m in tar.members(opened)}
    return bool(ends & marks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
