"""The registered domain of an address: who is behind it, whatever the host is called."""

from __future__ import annotations

import functools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tldextract
import xxhash

from dataset_build.addresses import literal
from dataset_build.hashing import U64

_HOST = r"^[a-zA-Z][a-zA-Z0-9+.-]*://(?:[^/?#@]*@)?(?P<host>\[[^\]/?#]*\]|[^/:?#]*)"


@functools.cache
def _suffixes() -> tldextract.TLDExtract:
    # The list of public suffixes that comes with the library: nothing is fetched or cached.
    return tldextract.TLDExtract(cache_dir=None, suffix_list_urls=())


@functools.lru_cache(maxsize=1 << 16)
def registered(host: str) -> str:
    """`example.co.uk` for `img.example.co.uk`; what is no name stands for itself.

    Of a suffix that the public list does not know, the last label is one.
    """
    domain: str = _suffixes()(host).top_domain_under_public_suffix
    if domain:
        return domain
    return ".".join(host.split(".")[-2:]) if literal(host) is None else host


@functools.lru_cache(maxsize=1 << 16)
def tenant(host: str) -> str:
    """`mine.blogspot.com` for `img.mine.blogspot.com`, `example.com` for `img.example.com`: of a
    domain under which anybody can have a name, whoever has this one."""
    found = _suffixes()(host, include_psl_private_domains=True)
    return found.top_domain_under_public_suffix or registered(host)


def is_public_suffix(host: str) -> bool:
    """Whether anybody may register a domain directly below this one, as below `co.uk`."""
    found = _suffixes()(host)
    return bool(found.suffix) and not found.domain


def hosts(urls: pa.Array | pa.ChunkedArray) -> pa.DictionaryArray:
    """Dictionary-encoded hosts of addresses; "" of what names none."""
    found = pc.struct_field(pc.extract_regex(urls, _HOST), "host")
    if isinstance(found, pa.ChunkedArray):
        found = found.combine_chunks()
    return found.fill_null("").dictionary_encode()


def of_urls(urls: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Dictionary-encoded registered domains of addresses; "" of what names no host."""
    found = hosts(urls)
    domains = [registered(host) for host in found.dictionary.to_pylist()]
    return pa.DictionaryArray.from_arrays(found.indices, pa.array(domains, pa.string()))


def hashed(domains: pa.DictionaryArray) -> U64:
    """xxh3-64 of each of some dictionary-encoded domains."""
    names = domains.dictionary.to_pylist()
    hashes = np.fromiter(map(_hash, names), np.uint64, len(names))
    result: U64 = hashes[domains.indices.to_numpy()]
    return result


def _hash(domain: str) -> int:
    value: int = xxhash.xxh3_64_intdigest(domain.encode())
    return value
