"""Damage to web archives: is it noticed, and what becomes of the records beside it?

`python -m tests.damage_archive $OPENWIT_DATA` makes archives of real pages and of metadata, each
compressed and plain. It cuts them at every 97th byte, and damages each record in turn: zeroed, bits
flipped, its checksum or size wrong, its Content-Length wrong by a little. All of it must be
noticed, but for what no file can tell: a cut between two records, bits of a plain body.
"""

from __future__ import annotations

import gzip
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastwarc.warc import ArchiveIterator, WarcRecordType

from dataset_build.extract.archive import records
from pipeline.stats import Stats
from tests.dataset_build.extract.conftest import record

LIES = (-50, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 50, 5000)
FLIPS = 4
_LENGTH = re.compile(rb"Content-Length: (\d+)")


@dataclass(frozen=True)
class Archive:
    """Records in order; of `kind` are those that have a body to be found."""

    name: str
    kind: WarcRecordType
    records: list[bytes]
    bodies: list[bytes | None]
    is_compressed: bool

    def piece(self, record: bytes) -> bytes:
        """A record as it is written."""
        return gzip.compress(record, mtime=0) if self.is_compressed else record

    def pieces(self) -> list[bytes]:
        return [self.piece(one) for one in self.records]


def crawl(pages: Sequence[bytes], is_compressed: bool) -> Archive:
    """A WARC: each page between its request and what the crawler noted."""
    written: list[bytes] = []
    bodies: list[bytes | None] = []
    for number, page in enumerate(pages):
        url = f"http://a.example/{number}"
        written += [
            record("request", url, b"GET /%d HTTP/1.1\r\nHost: a.example\r\n\r\n" % number),
            record("response", url, page),
            record("metadata", url, b"fetchTimeMs: %d\r\n\r\n" % number),
        ]
        bodies += [None, page, None]
    return Archive("pages", WarcRecordType.response, written, bodies, is_compressed)


def metadata(documents: Sequence[bytes], is_compressed: bool) -> Archive:
    """A WAT: a record a page."""
    written = [
        record("metadata", f"http://a.example/{n}", body) for n, body in enumerate(documents)
    ]
    return Archive("metadata", WarcRecordType.metadata, written, list(documents), is_compressed)


def cuts(archive: Archive, step: int) -> Iterator[tuple[str, int, int]]:
    """Kind of cut, where (bytes), and how many records are whole; from the end to the start."""
    ends = [0]
    for piece in archive.pieces():
        ends.append(ends[-1] + len(piece))
    for cut in sorted({*range(0, ends[-1], step), *ends[1:-1]}, reverse=True):
        yield (
            "cut between records" if cut in ends[1:] else "cut",
            cut,
            sum(end <= cut for end in ends[1:]),
        )


def damages(archive: Archive, seed: int) -> Iterator[tuple[str, int, bytes]]:
    """Kind of damage, number of the record, and what is written in its place."""
    draw = random.Random(seed)
    for number, (one, piece) in enumerate(zip(archive.records, archive.pieces(), strict=True)):
        yield "zeroed", number, bytes(len(piece))
        head = len(piece) if archive.is_compressed else one.index(b"\r\n\r\n")
        for _ in range(FLIPS):
            flipped = bytearray(piece)
            flipped[draw.randrange(len(piece))] ^= 1 << draw.randrange(8)
            where = "bit flipped"
            if not archive.is_compressed:
                where += " in head" if flipped[:head] != piece[:head] else " in body"
            yield where, number, bytes(flipped)
        for what, start in (("checksum", 8), ("size", 4)) if archive.is_compressed else ():
            wrong = bytearray(piece)
            wrong[len(wrong) - start + draw.randrange(4)] ^= 1 << draw.randrange(8)
            yield f"{what} wrong", number, bytes(wrong)
        length = int(_LENGTH.search(one)[1])  # type: ignore[index]
        for lie in LIES:
            if length + lie >= 0:
                told = _LENGTH.sub(b"Content-Length: %d" % (length + lie), one, count=1)
                yield f"length {lie:+d}", number, archive.piece(told)


def read(path: Path, kind: WarcRecordType) -> tuple[list[bytes], bool]:
    """Bodies found, and whether damage was noticed."""
    stats = Stats()
    found = [body for _, _, body in records(path, kind, stats)]
    return found, bool(stats.counts["broken_members"] or stats.counts["truncated_files"])


HEADS = ("times", "noticed", "harmless", "others", "recovered", "wrong")
Tally = Counter[tuple[str, str]]
"""(kind of damage, what) -> times; what is `times`, `noticed`, `harmless` (not noticed, but all
bodies are there), `others`, `recovered`, or `wrong`: bodies found that no record has. They may lack
white space at their end, but not have more: FastWARC takes any between two records."""


def sweep(archive: Archive, step: int, seed: int = 0) -> Tally:
    """Cut the archive at every `step` bytes, and damage each of its records in every way."""
    tally: Tally = Counter()
    pieces = archive.pieces()
    bodies = [body and body.rstrip() for body in archive.bodies]
    whole = [body for body in bodies if body is not None]
    longest = {body.rstrip(): len(body) for body in archive.bodies if body is not None}

    def account(kind: str, path: Path, others: Sequence[bytes | None]) -> None:
        read_now, is_noticed = read(path, archive.kind)
        found = [body.rstrip() for body in read_now]
        wrong = sum(len(body) > longest.get(body.rstrip(), -1) for body in read_now)
        expected = Counter(body for body in others if body is not None)
        tally[kind, "times"] += 1
        tally[kind, "noticed"] += is_noticed
        tally[kind, "harmless"] += not is_noticed and not wrong and found == whole
        tally[kind, "others"] += expected.total()
        tally[kind, "recovered"] += (expected & Counter(found)).total()
        tally[kind, "wrong"] += wrong

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("archive.gz" if archive.is_compressed else "archive")
        path.write_bytes(b"".join(pieces))
        intact = [body for body in archive.bodies if body is not None]
        assert read(path, archive.kind) == (intact, False), "damaged before"
        for kind, position, count in cuts(archive, step):
            os.truncate(path, position)
            account(kind, path, bodies[:count])
        for kind, number, damaged in damages(archive, seed):
            path.write_bytes(b"".join([*pieces[:number], damaged, *pieces[number + 1 :]]))
            account(kind, path, bodies[:number] + bodies[number + 1 :])
    return tally


def faults(tally: Tally) -> list[str]:
    """What went wrong, of what a file tells of; in words."""
    found = []
    for kind in kinds(tally):
        count = {what: tally[kind, what] for what in HEADS}
        is_untold = kind.startswith("bit flipped in")
        if kind != "cut between records" and not is_untold:
            missed = count["times"] - count["noticed"] - count["harmless"]
            found += [f"{kind}: {missed} not noticed"] * (missed > 0)
        if count["recovered"] < count["others"]:
            found.append(f"{kind}: {count['others'] - count['recovered']} others lost")
        if count["wrong"] and not is_untold:
            found.append(f"{kind}: {count['wrong']} wrong bodies")
    return found


def kinds(tally: Tally) -> list[str]:
    return list(dict.fromkeys(kind for kind, _ in tally))


def table(tally: Tally) -> str:
    lines = [" " * 22 + "".join(f"{head:>10}" for head in HEADS)]
    for kind in kinds(tally):
        lines.append(f"{kind:22}" + "".join(f"{tally[kind, head]:10,}" for head in HEADS))
    return "\n".join(lines)


def real(data: Path) -> tuple[list[bytes], list[bytes]]:
    """Bodies of real pages, and of the metadata of real pages."""
    found = []
    for name, kind in (
        ("news-pages-260.warc.gz", WarcRecordType.response),
        ("commoncrawl-2014-35.warc.wat", WarcRecordType.metadata),
    ):
        with (data / "webarchive" / name).open("rb") as stream:
            archived = ArchiveIterator(stream, record_types=kind, parse_http=False)
            found.append([one.reader.read() for one in archived])
    return found[0], found[1]


def main(data: Path, step: int = 97) -> int:
    pages, described = real(data)
    draw = random.Random(0)
    draw.shuffle(pages)
    many = [b'{"number": %d, ' % n + draw.choice(described)[1:] for n in range(200)]
    wrong = 0
    for archive in (
        crawl(pages[:40], True),
        crawl(pages[40:52], False),
        metadata(many, True),
        metadata(many[:150], False),
    ):
        size = sum(map(len, archive.pieces()))
        how = "compressed" if archive.is_compressed else "plain"
        print(f"{archive.name}, {how}: {len(archive.records)} records, {size:,} bytes", flush=True)
        tally = sweep(archive, step)
        print(table(tally), *faults(tally), sep="\n", flush=True)
        wrong += len(faults(tally))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
