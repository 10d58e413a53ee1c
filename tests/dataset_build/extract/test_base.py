"""What relative addresses are relative to: the page, or what its `<base>` says (HTML, §4.2.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import Extract, members, metadata, page

PAGE = "http://www.a.example/news/page.html?id=7"
IMAGE = "<img src='x.jpg' alt='some words'>"

BASES = [
    ("http://b.example/files/", "http://b.example/files/x.jpg"),
    ("http://b.example/files/index.html?q=/z/#top", "http://b.example/files/x.jpg"),
    ("https://b.example", "https://b.example/x.jpg"),
    ("//b.example/files/", "http://b.example/files/x.jpg"),
    ("/up/", "http://www.a.example/up/x.jpg"),
    ("/up", "http://www.a.example/x.jpg"),
    ("down/", "http://www.a.example/news/down/x.jpg"),
    ("../..//up/./", "http://www.a.example//up/x.jpg"),
    ("  /up/\n", "http://www.a.example/up/x.jpg"),
    # These are the page itself.
    ("", "http://www.a.example/news/x.jpg"),
    ("#top", "http://www.a.example/news/x.jpg"),
    ("?id=8", "http://www.a.example/news/x.jpg"),
    # And these are nothing that addresses can be relative to.
    ("javascript:void(0)", "http://www.a.example/news/x.jpg"),
    ("data:text/html,/up/", "http://www.a.example/news/x.jpg"),
    ("ftp://b.example/files/", "http://www.a.example/news/x.jpg"),
    ("http://", "http://www.a.example/news/x.jpg"),
    (f"/{'up' * 1000}/", "http://www.a.example/news/x.jpg"),
    (f"http://b.example/{'up' * 1000}/", "http://www.a.example/news/x.jpg"),
]


@pytest.mark.parametrize(("base", "url"), BASES)
def test_a_base(base: str, url: str, tmp_path: Path, extract: Extract) -> None:
    """The same from the page and from what its metadata say of it."""
    html = f'<head><base href="{base}"></head>{IMAGE}'.encode()
    (tmp_path / "x.warc.gz").write_bytes(b"".join(members(page(PAGE, html))))
    image = [{"url": "x.jpg", "alt": "some words"}]
    (tmp_path / "x.wat.gz").write_bytes(b"".join(members(metadata(PAGE, image, base))))
    rows, stats = extract(warc=[f"{tmp_path}/x.warc.gz"], wat=[f"{tmp_path}/x.wat.gz"])
    assert [(row["url"], row["page_url"]) for row in rows] == [(url, PAGE)] * 2
    assert stats.counts["pages"] == 2


@pytest.mark.parametrize(
    "html",
    [
        f"{IMAGE}<base href='/up/'>",
        f"<body><div>{IMAGE}<p><base href='/up/'></div>",
        f"<base target=_blank><base href='/up/'>{IMAGE}<base href='/other/'>",
        f"<BASE HREF=/up/>{IMAGE}",
        f"<!-- <base href='/other/'> --><base href='&#47;up/'>{IMAGE}",
        f"<script>'<base href=/other/>'</script><base href='/up/'>{IMAGE}",
    ],
)
def test_the_first_base_with_an_address_counts(html: str, tmp_path: Path, extract: Extract) -> None:
    (tmp_path / "x.warc.gz").write_bytes(b"".join(members(page(PAGE, html.encode()))))
    rows, _ = extract(warc=[f"{tmp_path}/x.warc.gz"])
    assert [row["url"] for row in rows] == ["http://www.a.example/up/x.jpg"]


@pytest.mark.parametrize(
    "html", ["<base href=''><base href='/up/'>", "<base href='data:,'><base href=/up/>"]
)
def test_a_second_base_never_counts(html: str, tmp_path: Path, extract: Extract) -> None:
    (tmp_path / "x.warc.gz").write_bytes(b"".join(members(page(PAGE, (html + IMAGE).encode()))))
    rows, _ = extract(warc=[f"{tmp_path}/x.warc.gz"])
    assert [row["url"] for row in rows] == ["http://www.a.example/news/x.jpg"]


@pytest.mark.parametrize("base", [["/up/"], {"href": "/up/"}, 7])
def test_metadata_with_a_base_that_is_no_text(base: Any, tmp_path: Path, extract: Extract) -> None:
    image = [{"url": "x.jpg", "alt": "some words"}]
    (tmp_path / "x.wat").write_bytes(metadata(PAGE, image, base))
    rows, _ = extract(wat=[f"{tmp_path}/x.wat"])
    assert [row["url"] for row in rows] == ["http://www.a.example/news/x.jpg"]
