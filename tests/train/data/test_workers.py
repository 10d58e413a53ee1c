"""Workers die, hang and are shouted at; the stream does not change, and nothing stays behind."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from tests.train.conftest import Pack, uid_of
from train.data.index import DatasetError, Index, open_dataset
from train.data.loader import Batch, Loader
from train.data.order import Order
from train.data.tokenizer import Tokenizer
from train.data.workers import WorkerFailed

ROOT = Path(__file__).parent.parent.parent.parent


def _loader(index: Index, *, lanes: int = 4, **options: Any) -> Loader:
    order = Order(index, seed=1, batch=8, lanes=lanes, block_samples=5)
    options = {"image_size": 24, "seed": 1, "margin": 4, "workers": 2} | options
    return Loader(index, order, Tokenizer(6), **options)


def _digest(batch: Batch) -> tuple[object, ...]:
    pixels, tokens = batch.image.contiguous().numpy(), batch.tokens.numpy()
    return batch.step, batch.uid, batch.damaged, pixels.tobytes(), tokens.tobytes()


def _workers_of(parent: int) -> list[int]:
    """Processes that `parent` started and that run as workers."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"train.data.workers" in (entry / "cmdline").read_bytes():
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(status[1]) == parent and status[0] != "Z":
                    found.append(int(entry.name))
        except OSError:
            continue
    return sorted(found)


def _wait_until(condition: Any, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def _stalled(index: Index) -> Iterator[Index]:
    """The same dataset on storage that never answers: opening its shard blocks."""
    fifo = f"{index.shards[0]}.fifo"
    os.mkfifo(fifo)
    yield replace(index, shards=(fifo, *index.shards[1:]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
def test_a_worker_lost_in_mid_epoch_changes_nothing(
    pack: Pack, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    index = open_dataset(pack(23, 22, damaged={7: b"torn"}))
    expected = [_digest(batch) for batch in _loader(index, workers=0).batches(3, 30)]
    seen = []
    draw = random.Random(number)
    with closing(_loader(index, worker_timeout_s=2).batches(3, 30)) as batches:
        for batch in batches:
            seen.append(_digest(batch))
            if batch.step in (5, 14):
                os.kill(draw.choice(_workers_of(os.getpid())), number)
    assert seen == expected
    told = "gave no sign of life" if number == signal.SIGSTOP else f"killed by {number.name}"
    assert caplog.text.count(told) == 2
    assert not _workers_of(os.getpid())


def test_workers_leave_it_to_the_trainer_when_to_stop(pack: Pack) -> None:
    index = open_dataset(pack(23, 22))
    expected = [_digest(batch) for batch in _loader(index, workers=0).batches(0, 12)]
    seen = []
    with closing(_loader(index).batches(0, 12)) as batches:
        for batch in batches:
            seen.append(_digest(batch))
            workers = _workers_of(os.getpid())
            for worker in workers:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                    os.kill(worker, number)
            assert _workers_of(os.getpid()) == workers
    assert seen == expected


def test_workers_that_always_die_end_the_run(pack: Pack) -> None:
    index = open_dataset(pack(9))
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.01):
            for worker in _workers_of(os.getpid()):
                with suppress(ProcessLookupError):  # of the blow before, and reaped by now
                    os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(WorkerFailed, match=r"killed by SIGKILL at step 0.*block_samples"):
            next(_loader(index).batches(0, 1))
    finally:
        over.set()
        killer.join()
    assert not _workers_of(os.getpid())


def test_storage_that_never_answers_ends_the_run_and_is_named(pack: Pack) -> None:
    with _stalled(open_dataset(pack(9))) as index:
        began = time.monotonic()
        with pytest.raises(
            WorkerFailed, match=r"no sign of life for 2 s.*00000\.tar\.fifo.*storage"
        ):
            next(_loader(index, workers=1, worker_timeout_s=2).batches(0, 1))
    assert time.monotonic() - began < 20
    assert not _workers_of(os.getpid())


def test_waiting_for_data_can_be_interrupted(pack: Pack) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with _stalled(open_dataset(pack(9))) as index:
            threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            with pytest.raises(Interrupted):
                next(_loader(index).batches(0, 1))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not _workers_of(os.getpid())


def test_a_fault_of_the_dataset_is_raised_at_its_step(pack: Pack) -> None:
    folder = pack(40, 5)
    index = open_dataset(folder)
    order = Order(index, seed=1, batch=8, lanes=1, block_samples=5)
    faulty = next(
        step
        for step in range(len(index) // 8)
        if any(index.shard[place.sample] == 1 for place in order.batch_of(step))
    )
    assert faulty > 0
    (folder / "shards" / "00001.tar").unlink()
    with pytest.raises(DatasetError, match=r"00001\.tar: bytes .* cannot be read"):
        list(_loader(index, lanes=1).batches(0, 9))
    with closing(_loader(index, lanes=1, prefetch=4).batches(0, 9)) as batches:
        for step in range(faulty):
            assert next(batches).step == step


def test_memory_is_used_again_but_not_under_a_batch_that_is_kept(pack: Pack) -> None:
    index = open_dataset(pack(23, 22))
    expected = [_digest(batch) for batch in _loader(index, workers=0).batches(0, 20)]
    addresses = set()
    kept = []
    with closing(_loader(index, prefetch=2).batches(0, 20)) as batches:
        for batch in batches:
            addresses.add(batch.image.data_ptr())
            if batch.step in (4, 9):
                kept.append(batch)
    assert len(addresses) <= 2 + 2 + len(kept)
    assert [_digest(batch) for batch in kept] == [expected[4], expected[9]]
    tokens = kept[0].tokens
    del batch, kept
    assert tokens.numpy().tobytes() == expected[4][-1]


def test_one_percent_damaged(pack: Pack, caplog: pytest.LogCaptureFixture) -> None:
    damaged = {17: b"", 130: b"<html>", 299: b"\xff\xd8\xff\xe0 torn"}
    index = open_dataset(pack(150, 150, damaged=damaged))
    names = sorted(uid_of(sample).hex() for sample in damaged)
    inline = _loader(index, workers=0)
    expected = [_digest(batch) for batch in inline.batches(0, 80)]
    assert sorted(inline.lost.uids) == names
    caplog.clear()
    loader = _loader(index, workers=3, max_lost=0.01)
    assert [_digest(batch) for batch in loader.batches(0, 80)] == expected
    assert sorted(loader.lost.uids) == names
    for name in names:  # met in every epoch, told once
        assert caplog.text.count(f"sample {name} is replaced") == 1
        assert sum(name in str(digest[2]) for digest in expected) >= 2
    assert [_digest(batch) for batch in _loader(index).batches(41, 80)] == expected[41:]


@pytest.mark.parametrize("workers", [0, 2])
def test_more_damage_than_allowed_ends_the_run(pack: Pack, workers: int) -> None:
    damaged = {17: b"", 130: b"<html>", 299: b"torn"}
    index = open_dataset(pack(150, 150, damaged=damaged))
    with pytest.raises(DatasetError, match=r"3 of 300 samples could not be decoded.*max_lost"):
        for _ in _loader(index, workers=workers, max_lost=0.009).batches(0, 80):
            pass
    assert not _workers_of(os.getpid())


def _named_memory(pid: int) -> list[str]:
    """Files of /dev/shm that a process has mapped: those that a crash would leave there."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line for line in lines if "/dev/shm/" in line]


def test_nothing_stays_behind(pack: Pack) -> None:
    index = open_dataset(pack(23))
    mine = _named_memory(os.getpid())  # other tests may have left some

    def use() -> None:
        with closing(_loader(index).batches(0, 9)) as batches:
            next(batches)
            workers = _workers_of(os.getpid())
            assert len(workers) == 2
            assert not any(_named_memory(pid) for pid in workers)
            assert _named_memory(os.getpid()) == mine

    use()
    assert not _workers_of(os.getpid())
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        use()
    assert not _workers_of(os.getpid())
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_nothing_stays_behind_a_trainer_that_is_killed(pack: Pack) -> None:
    folder = pack(23)
    script = f"""
        import sys
        from pathlib import Path
        from train.data.index import open_dataset
        from train.data.loader import Loader
        from train.data.order import Order
        from train.data.tokenizer import Tokenizer

        index = open_dataset(Path({str(folder)!r}))
        order = Order(index, seed=1, batch=8, lanes=4, block_samples=5)
        loader = Loader(index, order, Tokenizer(6), image_size=24, seed=1, workers=2)
        for batch in loader.batches(0, 10**9):
            if batch.step == 3:
                print("running", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "running\n"
        workers = _workers_of(trainer.pid)
        assert len(workers) == 2
        assert not any(_named_memory(pid) for pid in (trainer.pid, *workers))
        os.kill(workers[0], signal.SIGSTOP)  # even one that cannot notice
        trainer.kill()
    _wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_batches_reach_the_gpu(pack: Pack) -> None:
    index = open_dataset(pack(23))
    expected = [_digest(batch) for batch in _loader(index, workers=0).batches(0, 9)]
    for number, batch in enumerate(_loader(index, pinned=True).batches(0, 9)):
        assert batch.image.is_pinned()
        image = batch.image.to("cuda", non_blocking=True).cpu()
        torch.cuda.synchronize()
        assert image.contiguous().numpy().tobytes() == expected[number][3]
