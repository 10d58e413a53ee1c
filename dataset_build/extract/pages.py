"""Pages that are made to hold a reader up cost themselves only.

HTML's own rules make a parser's time grow with the square of how deep tags are nested, how many
attributes one has, and more: a page of 8 MiB can take hours. Small pages cannot, and are parsed
where they are wanted; a larger one is parsed by a process that its limits may end.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from selectolax.lexbor import SelectolaxError

from dataset_build.extract.html import Links, decoded, image_links
from dataset_build.processes import Killed
from pipeline.local import die_with_parent
from pipeline.stop import shielded

MAX_PAGE_BYTES = 8 << 20
"""Larger pages are to be cut."""
# Parsed in 0.1 ms, 0.2 s at worst: thirty `<b>`, each with another attribute, 970 lists within each
# other, 1000 `</b>`. Of 16 KiB that takes 0.9 s, of 64 KiB 22 s.
_SMALL_BYTES = 8 << 10
_MAX_PROCESSOR_S = 4.0  # of 8 MiB of real pages: 0.18 s
_MAX_MEMORY_BYTES = 2 << 30  # address space; of 8 MiB of real pages: 0.2 GiB
# What ends a process for the page it parses: its time, and a parser's mistakes.
_PAGES_FAULT = (signal.SIGPROF, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)


class CostlyPage(Exception):
    """A page took more time or memory to parse than any page for readers does."""


class Reader:
    """Parses pages. Use as a context manager; the process for large ones starts with the first."""

    def __init__(self, figure_captions: bool = False) -> None:
        self._figure_captions = figure_captions
        self._process: SpawnProcess | None = None
        self._connection: Connection
        self._page: Any = None  # memory of both processes: through a pipe it takes six times longer

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._ended()

    def links(self, html: bytes, charset: str) -> Links:
        """See `image_links` and `decoded`.

        Raises `CostlyPage`, and `Killed` if the process was ended by what no page can do.
        """
        if len(html) <= _SMALL_BYTES:
            return image_links(decoded(html, charset), self._figure_captions)
        process = self._process or self._started()
        try:
            memoryview(self._page).cast("B")[: len(html)] = html
            self._connection.send((len(html), charset, self._figure_captions))
            answer: Links | Exception = self._connection.recv()
        except (EOFError, OSError):
            process.join()
            code = process.exitcode
            self._ended()
            if code is not None and -code in _PAGES_FAULT:
                raise CostlyPage from None
            raise _killed(code) from None
        if isinstance(answer, MemoryError | SelectolaxError):  # the latter's cause is the same
            raise CostlyPage from answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _started(self) -> SpawnProcess:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._page = context.RawArray("c", MAX_PAGE_BYTES)
        self._process = process = context.Process(
            target=_serve,
            args=(theirs, self._page, os.getpid(), _MAX_PROCESSOR_S, _MAX_MEMORY_BYTES),
            daemon=True,
        )
        with shielded():
            process.start()
        theirs.close()
        try:
            self._connection.recv()
        except EOFError:
            process.join()
            code = process.exitcode
            self._ended()
            raise _killed(code) from None
        return process

    def _ended(self) -> None:
        assert self._process is not None
        self._connection.close()
        self._process.join()
        self._process.close()
        self._process = None


def _killed(code: int | None) -> Killed:
    how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    return Killed(f"the process that parses large pages ended: {how}; its words are above")


def _serve(
    connection: Connection, page: Any, parent: int, processor_s: float, memory_bytes: int
) -> None:
    """Answer pages with links, until a page ends this process or its parent does."""
    os.environ["OPENWIT_PARENT"] = str(parent)
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    connection.send("ready")
    while True:
        length, charset, figure_captions = connection.recv()
        html = bytes(memoryview(page).cast("B")[:length])
        # Of the processor's time, not the clock's: that others keep the machine busy costs no page.
        signal.setitimer(signal.ITIMER_PROF, processor_s)
        try:
            answer = pickle.dumps(image_links(decoded(html, charset), figure_captions))
        except Exception as error:
            answer = pickle.dumps(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(answer)
