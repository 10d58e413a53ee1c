"""Pictures over which the process died: an attempt leaves word of them, later ones pass them by.

The address at work stands in a file, and `faulthandler` writes behind it what ends the process: a
signal that a decoder brings about (SIGSEGV, SIGBUS, SIGABRT, SIGILL, SIGFPE, and SIGXCPU). A
process that others kill writes nothing, so that says nothing of a picture. Another thread may have
been the cause, so it takes two such deaths to condemn one.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

DETAIL = "the decoder died of it, twice"
_NOBODY = bytes(8)
_CONDEMNING = 2


class Deaths:
    """Those of a task's attempts, whose folder `partial` is; None where none outlives an attempt.

    `name` is that of this attempt alone.
    """

    def __init__(self, partial: Path | None, name: str) -> None:
        self.condemned: frozenset[bytes] = frozenset()
        """Addresses whose pictures must not be decoded."""
        self._path = partial / f"{name}.decoding" if partial else None
        self._file = -1
        self._was_enabled = False

    @contextmanager
    def decoding(self, address: bytes) -> Iterator[None]:
        """While a picture of this address is decoded."""
        if self._file < 0:
            yield
            return
        os.pwrite(self._file, address, 0)
        try:
            yield
        finally:
            os.pwrite(self._file, _NOBODY, 0)

    def __enter__(self) -> Deaths:
        if self._path is None:
            return self
        found: Counter[bytes] = Counter()
        for path in self._path.parent.glob("*.decoding"):
            content = path.read_bytes()
            if content[8:] and content[:8] != _NOBODY:
                found[content[:8]] += 1
                log.warning(
                    "an attempt died of the picture of %s: %s",
                    content[:8].hex(),
                    content[8:].decode(errors="replace").partition("\n")[0],
                )
        self.condemned = frozenset(a for a, times in found.items() if times >= _CONDEMNING)
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:  # the task is done elsewhere
            return self
        os.write(self._file, _NOBODY)  # what comes next stands behind it
        self._was_enabled = faulthandler.is_enabled()
        faulthandler.enable(self._file, all_threads=False)
        faulthandler.register(signal.SIGXCPU, self._file, all_threads=False, chain=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._file < 0 or self._path is None:
            return
        faulthandler.unregister(signal.SIGXCPU)
        faulthandler.disable()
        if self._was_enabled:
            faulthandler.enable(2)
        os.close(self._file)
        self._file = -1
        self._path.unlink(missing_ok=True)
