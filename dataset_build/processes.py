"""`map` over processes that end with this one; of one that is killed it is known what it read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from pipeline.local import die_with_parent

_NOTE_BYTES = 128
_notes: Any = None
_at = 0
"""Where this process writes into `_notes`, which all of them share."""


class Killed(Exception):
    """A process was killed; the message says what each was reading then."""


@contextmanager
def mapping(count: int) -> Iterator[Callable[..., Any]]:
    """A `map` over `count` processes; 0: in this one. Raises `Killed`."""
    if count == 0:
        yield map
        return
    context = get_context("spawn")
    notes, started = context.RawArray("c", _NOTE_BYTES * count), context.Value("i", 0)
    pool = ProcessPoolExecutor(count, context, _begin, (os.getpid(), notes, started))
    try:
        yield pool.map
    except BrokenProcessPool:
        places = range(0, len(notes), _NOTE_BYTES)
        each = [notes[at : at + _NOTE_BYTES].strip(b"\0").decode() for at in places]
        where = " or ".join(note for note in each if note)
        raise Killed(f"a process that read {where or 'nothing yet'} was killed") from None
    finally:
        pool.shutdown(cancel_futures=True)


def note(what: str) -> None:
    """Leave word of what this process reads now."""
    if _notes is not None:
        _notes[_at : _at + _NOTE_BYTES] = what.encode().ljust(_NOTE_BYTES, b"\0")


def _begin(parent: int, notes: Any, started: Any) -> None:
    global _notes, _at
    os.environ["OPENWIT_PARENT"] = str(parent)
    die_with_parent()
    with started.get_lock():
        _notes, _at = notes, _NOTE_BYTES * started.value
        started.value += 1
