"""A journal gives back what ended, up to the first byte that is not as it was written."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path
from typing import Any

import pytest

from dataset_build.download.journal import Journal, Unfinished, read, share
from dataset_build.download.outcome import Fetched, outcome
from pipeline import tar
from pipeline.config import Settings
from pipeline.manifest import Damaged
from pipeline.stage import Attempt, Run, Task
from pipeline.stop import StopFlag

SIZES = {"width": 3, "height": 2, "original_width": 30, "original_height": 20}
MARK = "0123456789abcdef"


def address(number: int) -> bytes:
    return hashlib.sha256(bytes([number])).digest()[:8]


def picture(number: int) -> bytes | None:
    """Every third address has none."""
    return random.Random(number).randbytes(40 * number) if number % 3 else None


def ended(number: int) -> dict[str, Any]:
    reason = "ok" if number % 3 else "dead_link"
    fetched = Fetched(reason, "", 200, f"http://a.example/{number}", 9, 1, bytes(32), 9, "jpeg", 7)
    result: dict[str, Any] = outcome(f"http://ä.example/{number}", fetched, picture(number), SIZES)
    return result


def write(path: Path, numbers: range) -> Journal:
    with Journal(path) as journal:
        for number in numbers:
            journal.end(address(number), ended(number), picture(number))
    return journal


def contents(path: Path) -> dict[bytes, dict[str, Any]]:
    """What can be read of a tar, pictures checked."""
    found = {}
    with tar.opened(path) as handle:
        try:
            for key, result, offset, _ in read(handle):
                size = result["staged_bytes"]
                stored = path.read_bytes()[offset : offset + size] if size else None
                number = int(result["url"].rpartition("/")[2])
                assert (key, stored) == (address(number), picture(number))
                found[key] = result
        except Damaged:
            pass
    return found


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    journal = write(tmp_path / "a.tar", range(10))
    found = journal.verified()
    assert {key: value for key, (value, _) in found.items()} == contents(tmp_path / "a.tar")
    assert contents(tmp_path / "a.tar") == {address(n): ended(n) for n in range(10)}


def test_every_address_is_with_the_kernel_when_it_has_ended(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.tar") as journal:
        for number in range(10):
            journal.end(address(number), ended(number), picture(number))
            assert len(contents(tmp_path / "a.tar")) == number + 1


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    write(tmp_path / "whole.tar", range(6))
    return tmp_path / "whole.tar"


def test_of_a_torn_tar_just_the_addresses_before_the_tear_are_read(
    whole: Path, tmp_path: Path
) -> None:
    data, torn = whole.read_bytes(), tmp_path / "torn.tar"
    with tar.opened(whole) as handle:
        records = [m for m in tar.members(handle) if m.name.endswith(".json")]
    for length in range(0, len(data), 97):
        torn.write_bytes(data[:length])
        assert len(contents(torn)) == sum(member.end <= length for member in records)


def test_no_damage_is_taken_for_an_outcome(whole: Path, tmp_path: Path) -> None:
    """Flipped bits, zeroed and dropped blocks: what is read is what was written, or nothing."""
    dice = random.Random(0)
    data, damaged = whole.read_bytes(), tmp_path / "damaged.tar"
    journal = write(tmp_path / "other.tar", range(6))
    journal.path = damaged
    for trial in range(600):
        at = dice.randrange(len(data))
        block = at // 512 * 512
        changed = bytearray(data)
        if trial % 3 == 0:
            changed[at] ^= 1 << dice.randrange(8)
        elif trial % 3 == 1:
            changed[block : block + 512] = bytes(512)
        else:
            del changed[block : block + 512]
        if changed == data:
            continue  # the block was zero
        damaged.write_bytes(changed)
        expected = {address(n): ended(n) for n in range(6)}
        assert contents(damaged).items() <= expected.items()
        with pytest.raises(Damaged):
            journal.verified()


def test_a_failed_write_is_final(tmp_path: Path) -> None:
    """Half a write, then a full disk, then space again: nothing is appended to a torn address."""
    with pytest.raises(OSError, match="an earlier write failed"):  # noqa: SIM117
        with Journal(tmp_path / "a.tar") as journal:
            journal.end(address(0), ended(0), picture(0))
            honest, journal._stream = journal._stream, Full(journal._stream)
            with pytest.raises(OSError, match="No space left"):
                journal.end(address(1), ended(1), picture(1))
            journal._stream = honest
            assert journal.failed
            journal.end(address(2), ended(2), picture(2))
    assert contents(tmp_path / "a.tar").keys() == {address(0)}


class Full:
    def __init__(self, stream: Any) -> None:
        self.stream, self.calls = stream, 0

    def write(self, data: memoryview) -> int:
        self.calls += 1
        if self.calls == 2:
            raise OSError(28, "No space left on device")
        return int(self.stream.write(data[: len(data) // 2]))


def attempt(run: Path, part: int, parts: int, name: str) -> Attempt:
    folder = run / "download" / "store" / name
    folder.mkdir(parents=True)
    task = Task("download", part, params={"part": part, "parts": parts})
    partial = run / "download" / "partial" / f"{part}-{parts}"
    return Attempt(Run(run, Settings()), task, folder, StopFlag(), partial=partial)


def leave(run: Path, part: int, parts: int, name: str, numbers: range, torn: int = 0) -> Path:
    """What an attempt of this name at this task leaves, all but its last bytes."""
    own = attempt(run, part, parts, name)
    path = own.folder / "x.tar"
    write(path, numbers)
    share(own, path, MARK)
    os.truncate(path, path.stat().st_size - torn)
    return path


def taken(own: Attempt, numbers: range, mark: str = MARK) -> set[int]:
    with Unfinished(own, mark, {address(n) for n in numbers}) as unfinished:
        for key, result in unfinished.outcomes.items():
            number = int(result["url"].rpartition("/")[2])
            assert (key, result) == (address(number), ended(number))
            assert unfinished.picture(key) == picture(number)
        return {int(o["url"].rpartition("/")[2]) for o in unfinished.outcomes.values()}


def test_what_attempts_left_is_found_once_and_by_the_settings_that_made_it(tmp_path: Path) -> None:
    leave(tmp_path, 0, 1, "first", range(4), torn=1024 + 1)
    leave(tmp_path, 0, 1, "second", range(2, 8))
    assert taken(attempt(tmp_path, 0, 1, "third"), range(20)) == set(range(8))
    assert taken(attempt(tmp_path, 0, 1, "fourth"), range(5)) == set(range(5))
    assert taken(attempt(tmp_path, 0, 1, "other"), range(20), "f" * 16) == set()


def test_attempts_at_another_plan_s_ranges_count_where_they_meet(tmp_path: Path) -> None:
    numbers = range(20)
    low = {n for n in numbers if address(n) < b"\x80"}
    leave(tmp_path, 0, 1, "whole", numbers)
    for part, wanted in ((0, low), (1, set(numbers) - low)):
        own = attempt(tmp_path, part, 2, f"half-{part}")
        with Unfinished(own, MARK, {address(n) for n in wanted}) as unfinished:
            assert unfinished.outcomes.keys() == {address(n) for n in wanted}
