"""The hashes that identify and order pairs. Changing any of them changes every dataset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

U64 = npt.NDArray[np.uint64]


def mix64(x: U64) -> U64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection whose bits look random."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def identify(urls: Sequence[str], norms: Sequence[str]) -> list[bytes]:
    """The uids of pairs: 64 bits of the address, then 64 of address and text, big-endian.

    The zero byte between url and norm makes the concatenation unambiguous: no norm contains one.
    """
    digest = xxhash.xxh3_64_digest
    addresses = [url.encode() for url in urls]
    return [
        digest(url) + digest(url + b"\0" + norm.encode())
        for url, norm in zip(addresses, norms, strict=True)
    ]


def halves(uids: pa.Array | pa.ChunkedArray) -> tuple[U64, U64]:
    """The upper and lower 64 bits of uids, as numbers that order as the bytes do."""
    if isinstance(uids, pa.ChunkedArray):
        uids = pa.concat_arrays(uids.chunks) if uids.num_chunks else pa.array([], uids.type)
    buffer = uids.buffers()[1]
    data = np.frombuffer(buffer if buffer is not None else b"", ">u8")
    both = data[2 * uids.offset : 2 * (uids.offset + len(uids))].reshape(-1, 2).astype(np.uint64)
    return both[:, 0], both[:, 1]
