"""Samples that somebody had removed after their dataset was packed: training does without them.

Their identifiers stand in text files, 32 hexadecimal digits a line, which `purge` writes: one a
request in the run, `RUN/removed/000001/uids.txt`, and one beside a packed dataset, `removed.txt`,
that goes where that is copied to. Whoever makes batches looks at it again while training goes on.
The order of training stays as it is: another sample of the block stands in, as for one that is
damaged, so a batch follows from the order, the step and what is removed when it is made.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data import storage
from train.data.index import DatasetError

log = logging.getLogger(__name__)

LOOK_EVERY_S = 10.0
"""A removal takes effect after this time, and the batches that are made by then."""

ANY = "[0-9]*"
"""In a pattern, the folder of any request that is in force; others are still being written."""

_DIGITS = 32


class Removed:
    """The samples that some files list; a file that is not there lists none, `ANY` stands for any
    request's folder.

    What is listed once stays removed for the life of this object, whatever becomes of the file.
    Raises `DatasetError` if a file cannot be read when it is first looked at; later that is a
    warning, and it is looked at again.
    """

    def __init__(self, addresses: Sequence[str], *, timeout_s: float, every_s: float) -> None:
        self._addresses = addresses
        self._timeout_s = timeout_s
        self._every_s = every_s
        self._seen: dict[str, str] = {}
        self._uids = np.empty((0, 2), np.uint64)
        """[samples, 2], ascending: high and low halves."""
        for address in self._found():
            self._look(address)
        self._looked = time.monotonic()

    def __len__(self) -> int:
        return len(self._uids)

    def look(self) -> None:
        """Read what has changed, if the last look is long enough ago."""
        if not self._addresses or time.monotonic() - self._looked < self._every_s:
            return
        for address in self._found():
            try:
                self._look(address)
            except DatasetError as error:
                log.warning("%s; it is looked at again in %g s", error, self._every_s)
        self._looked = time.monotonic()

    def __contains__(self, uid: NDArray[np.uint64]) -> bool:
        """Whether a sample is listed, by the halves of its identifier, [2]."""
        if not len(self._uids):
            return False
        high = self._uids[:, 0]
        first, last = np.searchsorted(high, uid[0], "left"), np.searchsorted(high, uid[0], "right")
        return bool((self._uids[first:last, 1] == uid[1]).any())

    def _found(self) -> list[str]:
        """The files, those that a pattern of this machine names among them."""
        found = []
        for address in self._addresses:
            folder, any_, rest = address.partition(ANY)
            found += [str(path) for path in Path(folder).glob(any_ + rest)] if any_ else [address]
        return sorted(found)

    def _look(self, address: str) -> None:
        stamp = storage.stamp(address, timeout_s=self._timeout_s)
        if stamp in ("", self._seen.get(address)):
            return
        listed = parse(address, storage.fetch(address, timeout_s=self._timeout_s))
        known = len(self)
        self._uids = np.unique(np.concatenate([self._uids, listed]), axis=0)
        self._seen[address] = stamp
        if new := len(self) - known:
            log.info("%s: %d more samples are removed; others stand in for them", address, new)


def parse(address: str, data: bytes) -> NDArray[np.uint64]:
    """The identifiers in a file's bytes, [samples, 2]. Raises `DatasetError` naming a bad line."""
    lines = data.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            whole = len(line) == _DIGITS and bytes.fromhex(line.decode())
        except ValueError:
            whole = False
        if not whole:
            raise DatasetError(f"{address}:{number}: not the {_DIGITS} digits of a sample's uid")
    return np.frombuffer(bytes.fromhex(b"".join(lines).decode()), ">u8").reshape(-1, 2).astype("u8")
