"""A small download with its verdicts, queries and balance, as the stages before `pack` publish
them."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dataset_build import records, uid_range
from pipeline.stage import Run
from tests.dataset_build.hand_made import write_groups

PAIRS = 23
Downloaded = list[tuple[str, list[int]]]  # the names of the files, and the pairs in each


def address_of(number: int) -> int:
    """The last three pairs are captions of one picture."""
    return min(number, PAIRS - 3)


def uid_of(number: int) -> bytes:
    halves = f"address {address_of(number)}", f"pair {number}"
    return b"".join(hashlib.md5(half.encode()).digest()[:8] for half in halves)


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32 + number, 24), (number * 9, 80, 10)).save(stream, "JPEG")
    return stream.getvalue()


def text_of(number: int) -> str:
    return f"picture {number} ★ naïve 猫"


def survives(number: int) -> bool:
    return number % 5 != 0


def parts_of(parts: int) -> Downloaded:
    result = []
    for part in range(parts):
        first, last = uid_range.bounds(part, parts)
        own = [n for n in sorted(range(PAIRS), key=uid_of) if first <= uid_of(n) <= last]
        result.append((f"{part:05d}-of-{parts:05d}.parquet", own))
    return result


def write_download(folder: Path, parts: Downloaded, order: random.Random) -> None:
    """Each part's pictures in some tars, as several downloads leave them."""
    for part, (name, numbers) in enumerate(parts):
        pictures = sorted({address_of(n) for n in numbers})
        order.shuffle(pictures)
        cuts = order.sample(range(len(pictures) + 1), k=min(2, len(pictures)))
        staged = {}
        for place, chunk in enumerate(
            pictures[i:j] for i, j in pairwise([0, *sorted(cuts), len(pictures)])
        ):
            path = folder / f"staged-{part:05d}-{place:016x}.tar"
            write_tar(path, chunk, order)
            with tarfile.open(path) as tar:
                members = {member.name: member.offset_data for member in tar}
            for number in chunk:
                staged[number] = path.name, members[f"{uid_of(number)[:8].hex()}.jpg"]
        rows = [
            {
                "uid": uid_of(n),
                "url": f"http://a.example/{address_of(n)}",
                "text": text_of(n),
                "page_url": "http://a.example/",
                "source": "alt",
                "snapshot": "CC-1",
                "file": "a.wat.gz",
                "status": "ok",
                "fetched": order.randrange(1 << 30),
                "bytes": 4 + len(picture(address_of(n))),
                "format": "png",
                "staged": staged[address_of(n)][0],
                "staged_offset": staged[address_of(n)][1],
                "staged_bytes": len(picture(address_of(n))),
                "staged_sha256": hashlib.sha256(picture(address_of(n))).digest(),
                "final_url": f"http://a.example/{address_of(n)}.jpg",
                "sha256": hashlib.sha256(b"sent" + picture(address_of(n))).digest(),
                "width": 32 + address_of(n),
                "height": 24,
                "original_width": 64 + address_of(n),
                "original_height": 48,
                "blurred": address_of(n) % 3,
            }
            for n in numbers
        ]
        table = pa.Table.from_pylist(rows, schema=records.FETCHED)
        pq.write_table(table, folder / f"fetched-{name}")


def write_tar(path: Path, pictures: list[int], order: random.Random) -> None:
    with tarfile.open(path, "w") as tar:
        for number in pictures:
            for extension, data in (("jpg", picture(number)), ("txt", b"?"), ("json", b"{}")):
                member = tarfile.TarInfo(f"{uid_of(number)[:8].hex()}.{extension}")
                member.size = len(data)
                member.mtime = order.randrange(1 << 30)
                tar.addfile(member, io.BytesIO(data))


def write_screen(folder: Path, parts: Downloaded) -> None:
    kept = []
    for name, numbers in parts:
        rows = [
            {
                "uid": uid_of(n),
                "keep": survives(n),
                "reason": "",
                "selected_by": [n],
                "captions": [text_of(n), f"another of {n}"],
                "duplicate_group": uid_of(n - n % 5),
            }
            for n in numbers
        ]
        table = pa.Table.from_pylist(rows, schema=records.SCREENED)
        pq.write_table(table, folder / f"screened-{name}")
        kept.append({"file": f"screened-{name}", "kept": sum(map(survives, numbers))})
    (folder / "survivors.json").write_text(json.dumps(kept))


def write_queries(folder: Path) -> None:
    rows = [{"query_id": n, "text": f"Query № {n}"} for n in range(PAIRS + 1)]
    table = pa.Table.from_pylist(rows, schema=records.QUERIES)
    pq.write_table(table, folder / "queries.parquet")


def write_balance(run: Run, folder: Path) -> None:
    """What each pair was selected by is not what keeps it: see `write_screen`."""
    rows = [
        {
            "uid": uid_of(n),
            "occurrences": 1 + n,
            "query_ids": [n, n + 1],
            "selected_by": [n, n + 1],
            "probability": 0.5,
        }
        for n in range(PAIRS)
    ]
    write_groups(run, folder, "selected", rows, records.SELECTED)


Pack = Callable[..., Run]
