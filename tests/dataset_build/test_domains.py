from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from dataset_build import domains

REGISTERED = {
    "http://example.com/a.jpg": "example.com",
    "https://img.cdn.example.com/a.jpg": "example.com",
    "http://img.example.com:8080/a.jpg": "example.com",
    "http://example.com./a.jpg": "example.com",
    "http://user:secret@img.example.com/a.jpg": "example.com",
    "http://user@img.example.com:81": "example.com",
    "http://a.b@c.example@img.example.org/": "example.org",
    "http://img.example.com?by=x@y.example.org": "example.com",
    "http://img.example.com#x@y.example.org": "example.com",
    "http://img.example.com/x@y.example.org/http://z.example.net/": "example.com",
    "http://img.example.co.uk/a.jpg": "example.co.uk",
    "http://co.uk/a.jpg": "co.uk",
    "http://www.xn--bcher-kva.de/a.jpg": "xn--bcher-kva.de",
    "http://a.b.example.nosuchsuffix/a.jpg": "example.nosuchsuffix",
    "http://localhost/a.jpg": "localhost",
    "http://192.0.2.7/a.jpg": "192.0.2.7",
    "http://192.0.2.7:8080/a.jpg": "192.0.2.7",
    "http://0x7f.1/a.jpg": "0x7f.1",
    "http://2130706433/a.jpg": "2130706433",
    "https://[2001:db8::1]/a.jpg": "[2001:db8::1]",
    "https://me@[2001:db8::1]:443/a.jpg": "[2001:db8::1]",
    "ftp://files.example.com/a.jpg": "example.com",
    "mailto:someone@example.com": "",
    "/a.jpg": "",
    "img.example.com/a.jpg": "",
    "http:///a.jpg": "",
    "": "",
}


@pytest.mark.parametrize("url", REGISTERED)
def test_who_is_behind_an_address(url: str) -> None:
    assert domains.of_urls(pa.array([url])).to_pylist() == [REGISTERED[url]]


def test_whole_columns_in_chunks_and_with_nulls() -> None:
    urls = list(REGISTERED) * 2
    expected = list(REGISTERED.values()) * 2
    for size in (1, 3, len(urls)):
        chunks = [urls[start : start + size] for start in range(0, len(urls), size)]
        found = domains.of_urls(pa.chunked_array(chunks, pa.string()))
        assert found.type == pa.dictionary(pa.int32(), pa.string())
        assert found.to_pylist() == expected
    assert domains.of_urls(pa.array(["", None, "http://a.example.com/"])).to_pylist() == [
        "",
        "",
        "example.com",
    ]
    assert len(domains.of_urls(pa.chunked_array([], pa.string()))) == 0


def test_a_hash_is_of_the_name_alone() -> None:
    """Whatever dictionary it is taken from: thresholds are compared across files."""
    one = domains.of_urls(pa.array(["http://a.example.com/", "http://192.0.2.7/", "/"]))
    other = domains.of_urls(
        pa.array(["/", "http://b.example.com:81/", "http://x.org/", "http://192.0.2.7/"])
    )
    first, second = domains.hashed(one), domains.hashed(other)
    assert first.dtype == np.uint64
    assert first[[2, 0, 1]].tolist() == second[[0, 1, 3]].tolist()
    assert len({*first.tolist(), *second.tolist()}) == 4
    assert domains.hashed(one.slice(1, 1)).tolist() == first[1:2].tolist()


@pytest.mark.parametrize(
    ("host", "tenant"),
    [
        ("img.mine.blogspot.com", "mine.blogspot.com"),
        ("mine.github.io", "mine.github.io"),
        ("blogspot.com", "blogspot.com"),
        ("farm1.static.example.co.uk", "example.co.uk"),
        ("a.b.example.nosuchsuffix", "example.nosuchsuffix"),
        ("192.0.2.7", "192.0.2.7"),
    ],
)
def test_a_tenant_is_no_other_one(host: str, tenant: str) -> None:
    assert domains.tenant(host) == tenant
