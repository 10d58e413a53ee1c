"""Canonical addresses: what a browser would request, equal strings for equal addresses."""

from __future__ import annotations

from urllib.parse import urljoin

import ada_url
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataset_build.extract.urls import canonical, extension

PAGE = "https://www.example.org/news/2023/page.html?id=1#top"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://a.example/x.jpg", "http://a.example/x.jpg"),
        ("HTTP://A.Example:80/X.jpg#part", "http://a.example/X.jpg"),
        ("https://a.example:443/x?b=1&a=2", "https://a.example/x?b=1&a=2"),
        ("https://a.example:8443/x", "https://a.example:8443/x"),
        ("http://a.example", "http://a.example/"),
        ("http://a.example?q", "http://a.example/?q"),
        ("http://a.example./x", "http://a.example/x"),
        ("//cdn.example/x.jpg", "https://cdn.example/x.jpg"),
        ("/x.jpg", "https://www.example.org/x.jpg"),
        ("x.jpg", "https://www.example.org/news/2023/x.jpg"),
        ("./x.jpg", "https://www.example.org/news/2023/x.jpg"),
        ("../x.jpg", "https://www.example.org/news/x.jpg"),
        ("../../../../x.jpg", "https://www.example.org/x.jpg"),
        ("http://a.example/b/../c/./x.jpg", "http://a.example/c/x.jpg"),
        ("?w=1", "https://www.example.org/news/2023/page.html?w=1"),
        ("  /a b\t.jpg\n", "https://www.example.org/a%20b.jpg"),
        ("/caf\u00e9/\u732b.jpg", "https://www.example.org/caf%C3%A9/%E7%8C%AB.jpg"),
        ("/100%25.jpg", "https://www.example.org/100%25.jpg"),
        ("http://b\u00fccher.example/x", "http://xn--bcher-kva.example/x"),
        ("/x.jpg?a=1&amp;b=2&copy=3", "https://www.example.org/x.jpg?a=1&b=2&copy=3"),
        ("\\img\\x.jpg", "https://www.example.org/img/x.jpg"),
        ("http://a.example//b//x.jpg", "http://a.example//b//x.jpg"),
        ("\x01/x.jpg\x1f ", "https://www.example.org/x.jpg"),
        ("/a/%2e%2E/b/%2e/x.jpg", "https://www.example.org/b/x.jpg"),
        ("/%41%2fb", "https://www.example.org/%41%2fb"),
        ("https:x.jpg", "https://www.example.org/news/2023/x.jpg"),
        ("HTTPS:/x.jpg", "https://www.example.org/x.jpg"),
        ("http:a.example/x", "http://a.example/x"),
        ("http:///a.example/x", "http://a.example/x"),
        ("///a.example/x", "https://a.example/x"),
        ("http://fa\u00df.example/x", "http://xn--fa-hia.example/x"),
        ("http://\uff21\uff0eexample/x", "http://a.example/x"),
        ("http://\U0001f600.example/x", "http://xn--e28h.example/x"),
        ("a:b.jpg", ""),
    ],
)
def test_address(url: str, address: str) -> None:
    assert canonical(url, PAGE)[0] == address


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/gif;base64,R0lGOD", "data_uri"),
        (" DATA:image/png,x", "data_uri"),
        ("javascript:alert(1)", "not_http"),
        ("file:///etc/passwd", "not_http"),
        ("ftp://a.example/x.jpg", "not_http"),
        ("blob:https://a.example/1", "not_http"),
        ("", "bad_url"),
        ("http://", "bad_url"),
        ("#", "bad_url"),
        ("#top", "bad_url"),
        ("about:blank", "not_http"),
        ("http://localhost/x.jpg", "bad_url"),
        ("http://[2001:db8::1]/x.jpg", "bad_url"),
        ("http://user:secret@a.example/x.jpg", "bad_url"),
        ("http://[::1/x.jpg", "bad_url"),
        ("http://a b.example/x", "bad_url"),
        ("http://" + "\u00e9" * 70 + ".example/", "bad_url"),
        ("http://a.example/" + "x" * 3000, "long_url"),
        ("/" + "\u00e9" * 900, "long_url"),
    ],
)
def test_reason(url: str, reason: str) -> None:
    assert canonical(url, PAGE) == ("", reason)


def test_empty_segments_stay() -> None:
    assert canonical("x.jpg", "http://a.example/b//c/d")[0] == "http://a.example/b//c/x.jpg"


def test_a_relative_link_needs_a_base() -> None:
    assert canonical("x.jpg", "") == ("", "bad_url")
    assert canonical("x.jpg", "page.html") == ("", "bad_url")


PLAIN = st.lists(
    st.sampled_from(
        [
            *("x.jpg", "/", "//", "..", ".", "%2e", "%41", "?", "q=1&a=b", " ", "\t", "\x01"),
            *("\u00e9", "\u732b", "[1]", "\\", "{", "`", "http:", "https:", "//a.example"),
            "//fa\u00df.example:80/",
        ]
    )
).map("".join)


@settings(deadline=None)
@given(PLAIN)
def test_what_a_browser_would_request(url: str) -> None:
    """Ada is a WHATWG parser. We keep less (hosts without a dot, the page itself), and percent-
    encode in queries what RFC 3986 forbids there."""
    address, _ = canonical(url, PAGE)
    if address:
        path, _, query = ada_url.URL(url, PAGE).href.partition("#")[0].partition("?")
        host, slash, rest = path.removeprefix("https://").removeprefix("http://").partition("/")
        path = f"{path[: path.index('://')]}://{host.removesuffix('.')}{slash}{rest}"
        for sign in "\\{`":
            query = query.replace(sign, f"%{ord(sign):02X}")
        assert address == path + (f"?{query}" if "?" in address else "")


ODD = st.text(st.sampled_from("ab./:?#%&;=@\\[] \u00e9\u732b\ud800\x00hHtTpPs0129"))


@settings(deadline=None)
@given(ODD | st.builds(lambda rest: "http://a.example/" + rest, ODD))
@example("http://a.example/%")
@example("http://a.example/./..")
@example("http://a.example/a/..?/../b")
def test_canonical_is_stable_ascii_and_never_raises(url: str) -> None:
    address, reason = canonical(url, PAGE)
    assert bool(address) != bool(reason)
    if address:
        assert address.isascii()
        assert canonical(address, "https://other.example/") == (address, "")
        assert not any(c.isspace() or c == "#" for c in address)


@settings(deadline=None)
@given(
    st.sampled_from(
        ["x.jpg", "/x", "//h.example/x", "a/b.png", "../x", "?q=1", "./a/../b", ".", ".."]
    ),
    st.sampled_from(
        ["http://a.example/", "http://a.example", "http://a.example/b/c/d?e/f#g/h", PAGE]
    ),
)
def test_resolution_agrees_with_the_standard_library(url: str, base: str) -> None:
    assert canonical(url, base)[0] == canonical(urljoin(base, url))[0]


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://a.example/x.JPG?y=z.png", "jpg"),
        ("http://a.example/a.b/x", ""),
        ("http://a.example/", ""),
        ("http://a.example/x.svg", "svg"),
    ],
)
def test_extension(url: str, name: str) -> None:
    assert extension(url) == name
