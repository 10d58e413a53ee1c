"""PDQ, a perceptual hash: pictures that look alike have hashes that differ in few of 256 bits.

The hash is that of Meta's ThreatExchange (Davis, Rosen 2019), by its own library; written in
hexadecimal it is what other users of PDQ exchange. Copies of a photo that were re-encoded or
resized differ in at most some 30 bits, two photos in 90 and more. `Index` finds exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import pdqhash

BYTES = 32
MOST_DISTANCE = 31
"""What `Index` can search for; PDQ's authors take pictures up to here as the same."""
PARTS, WEAK = 8, 4
"""Parts of 32 bits, and how many weak bits of each are marked; see `near`."""

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]

_PAIRS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Hash:
    """A picture's hash."""

    pdq: bytes
    weak: bytes
    """Of each 32 bits the four that were decided most narrowly, as a mask."""
    quality: int
    """0 to 100; how much there is to see. A plain area has 0, and its hash means nothing."""


class Undecodable(Exception):
    """The bytes are no picture that OpenCV reads."""


def hash_of(data: bytes) -> Hash:
    """The hash of an encoded picture. Raises `Undecodable`."""
    grey = cv2.imdecode(np.frombuffer(data, "u1"), cv2.IMREAD_GRAYSCALE) if data else None
    if grey is None:
        raise Undecodable
    coefficients, quality = pdqhash.compute_float(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB))
    bits, weak = bits_of(np.asarray(coefficients)[None])
    return Hash(bits.tobytes(), weak.tobytes(), int(quality))


def bits_of(coefficients: npt.NDArray[np.float64]) -> tuple[U8, U8]:
    """Hashes and weak bits out of PDQ's coefficients [n, 256]: uint8 [n, 32] both."""
    above = coefficients - np.median(coefficients, axis=1, keepdims=True)
    margin = np.abs(above).reshape(-1, PARTS, 32)
    weak = np.zeros(margin.shape, np.bool_)
    # A stable sort, so that equal margins do not depend on the processor's instructions.
    order = np.argsort(margin, axis=2, kind="stable")
    np.put_along_axis(weak, order[:, :, :WEAK], True, axis=2)
    return np.packbits(above > 0, axis=1), np.packbits(weak.reshape(-1, 256), axis=1)


def packed(hashes: list[bytes]) -> U64:
    """Hashes of 32 bytes as uint64 [n, 4]."""
    return np.frombuffer(b"".join(hashes), "u8").reshape(-1, 4)


def distances(ones: U64, others: U64) -> U8:
    """Bits in which hashes differ, row by row; uint64 [n, 4] both."""
    # 256 does not fit into a byte; 255 is as far away.
    differing = np.bitwise_count(ones ^ others).sum(axis=1, dtype=np.uint16)
    found: U8 = np.minimum(differing, 255).astype(np.uint8)
    return found


class Index:
    """Hashes among which all neighbours of others are found, exactly.

    Of 16 parts of 16 bits, two hashes up to 15 bits apart have one in common; up to 31 apart, one
    that differs in at most a bit. So 16 or 272 look-ups a query, each in a list of n / 65,536.
    """

    def __init__(self, hashes: U64) -> None:
        self._hashes = hashes
        words: U16 = hashes.view(np.uint16).reshape(-1, 16)
        self._order = [np.argsort(words[:, part], kind="stable") for part in range(16)]
        self._starts = [
            np.concatenate([[0], np.bincount(words[:, part], minlength=1 << 16).cumsum()])
            for part in range(16)
        ]

    def within(self, queries: U64, distance: int) -> tuple[Rows, Rows, U8]:
        """Pairs of (query, entry) up to `distance` bits apart, sorted, with that distance."""
        assert distance <= MOST_DISTANCE
        words: U16 = np.ascontiguousarray(queries).view(np.uint16).reshape(-1, 16)
        flips = [0, *(1 << bit for bit in range(16))] if distance > 15 else [0]
        found = [np.zeros((2, 0), np.int64)]
        for part, (order, starts) in enumerate(zip(self._order, self._starts, strict=True)):
            for flip in flips:
                key = words[:, part] ^ np.uint16(flip)
                first, stop = starts[key], starts[key + np.int64(1)]
                for query, place in _expand(first, stop - first):
                    entry = order[place]
                    near = distances(queries[query], self._hashes[entry]) <= distance
                    found.append(np.stack([query[near], entry[near]]))
        query, entry = np.unique(np.concatenate(found, axis=1), axis=1)
        return query, entry, distances(queries[query], self._hashes[entry])


def _expand(first: Rows, length: Rows) -> list[tuple[Rows, Rows]]:
    """(row, each of its `length` numbers from `first`), in pieces of bounded size."""
    rows = np.flatnonzero(length)
    if not rows.size:
        return []
    ends = length[rows].cumsum()
    cuts = np.searchsorted(ends, np.arange(_PAIRS_AT_ONCE, ends[-1], _PAIRS_AT_ONCE))
    pieces = []
    for own in np.split(rows, np.unique(cuts)):
        if own.size:
            row = np.repeat(own, length[own])
            before = np.repeat(length[own].cumsum() - length[own], length[own])
            pieces.append((row, first[row] + np.arange(row.size) - before))
    return pieces
