"""Image links of archived pages: encodings, transfer codings, lazily loaded pictures."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from dataset_build.extract.html import decoded, image_links

from .conftest import Extract, members, page, record

PAGE = "http://www.a.example/news/page.html"


def image(attributes: str) -> str:
    return image_links(f"<html><body><img {attributes}></body></html>")[1][0][0]


@pytest.mark.parametrize(
    ("attributes", "url"),
    [
        ("src=a.jpg", "a.jpg"),
        ("src=a.jpg data-src=b.jpg", "b.jpg"),
        ("src='data:image/gif;base64,AAAA' data-src=b.jpg", "b.jpg"),
        ("src='data:image/gif;base64,AAAA'", "data:image/gif;base64,AAAA"),
        ("src=a.jpg data-src='b_{width}.jpg'", "a.jpg"),
        ("src='data:,' srcset='s.jpg 300w, l.jpg 1200w, m.jpg 600w'", "l.jpg"),
        ("srcset='one.jpg, two.jpg 2x'", "two.jpg"),
        ("srcset=', a.jpg 2x,, b.jpg ,c.jpg 1x'", "a.jpg"),
        ("src=a.jpg srcset='b.jpg wide' data-srcset=', ,'", "a.jpg"),
        ("srcset='b.jpg wide, c.jpg'", "c.jpg"),
        ("srcset='w_1,h_2/a.jpg 1x,w_3,h_4/b.jpg 1.5x'", "w_3,h_4/b.jpg"),
        ("data-srcset='c.jpg 2x' srcset='data:image/gif;base64,A 1w'", "c.jpg"),
        ("src='//:0' data-srcset='c.jpg 160w, d.jpg 320w'", "d.jpg"),
        ("src='#' srcset=c.jpg", "c.jpg"),
        ("src='data:image/png;base64,AAAA' data-img-url=b.jpg data-img-retina-url=c.jpg", "b.jpg"),
        ("data-delayed-url=b.jpg", "b.jpg"),
        ("src='#'", "#"),
        ("src='//a.example/b.jpg' srcset=c.jpg", "//a.example/b.jpg"),
        ("alt=x", ""),
        ("src='x&amp;y.jpg'", "x&y.jpg"),
    ],
)
def test_address(attributes: str, url: str) -> None:
    assert image(attributes) == url


def test_texts_and_base() -> None:
    base, links = image_links(
        '<head><base href="/b/"></head><img src=a alt="A &amp; B" title=T><img src=b alt="">'
        "<noscript><img src=c alt='C'></noscript>"
    )
    assert base == "/b/"
    assert [texts for _, texts in links] == [[("alt", "A & B"), ("title", "T")], [], [("alt", "C")]]


@pytest.mark.parametrize(
    ("html", "url"),
    [
        ("<picture><source srcset='a.webp 1x, b.webp 2x'><img></picture>", "b.webp"),
        ("<picture><source srcset=a.webp><img src=c.jpg></picture>", "c.jpg"),
        ("<picture><source srcset=a.webp><img src='data:,' srcset='c 1w'></picture>", "c"),
        ("<picture><source media=x><source data-srcset=d><img src='data:,'></picture>", "d"),
        ("<video><source srcset=a.webp><img></video>", ""),
    ],
)
def test_sources_of_a_picture(html: str, url: str) -> None:
    assert image_links(html)[1][0][0] == url


@pytest.mark.parametrize(
    ("html", "captions"),
    [
        ("<figure><img><figcaption>A <b>r</b>ed\n door</figcaption></figure>", ["A red\n door"]),
        ("<figure><div><a><img></a></div><p><img><figcaption>C</figcaption></figure>", ["C", "C"]),
        ("<figure><img><figcaption><p>C<p>D<br>E</figcaption></figure>", ["C D E"]),
        ("<figure><img><figcaption>A<script>B</script></figcaption></figure>", ["A"]),
        ("<figure><img><figcaption>C</figcaption><figcaption>D</figcaption></figure>", ["C"]),
        (
            "<figure><img><figure><img><figcaption>in</figcaption></figure><figure><img></figure>"
            "<figcaption>out</figcaption></figure>",
            ["out", "in", ""],
        ),
        ("<figure><img></figure><figcaption>C</figcaption><img>", ["", ""]),
    ],
)
def test_captions_of_figures(html: str, captions: list[str]) -> None:
    assert [dict(texts).get("figcaption", "") for _, texts in image_links(html, True)[1]] == (
        captions
    )
    assert not any(texts for _, texts in image_links(html)[1])


def test_captions_of_figures_are_candidates(tmp_path: Path, extract: Extract) -> None:
    html = (
        b"<figure><img src=x.jpg alt='Red  door' title='Old house'>"
        b"<img src=y.jpg alt='A red\ndoor'>"
        b"<figcaption>A <i>red</i>\n door</figcaption></figure><image src=z.jpg alt='A cat'>"
    )
    (tmp_path / "x.warc.gz").write_bytes(b"".join(members(page(PAGE, html))))
    rows, stats = extract(warc=[f"{tmp_path}/x.warc.gz"], figure_captions=True)
    assert [(row["url"][-5:], row["text"], row["source"]) for row in rows] == [
        ("x.jpg", "Red door", "alt"),
        ("x.jpg", "Old house", "title"),
        ("x.jpg", "A red door", "figcaption"),
        ("y.jpg", "A red door", "alt"),
        ("y.jpg", "A red door", "figcaption"),
        ("z.jpg", "A cat", "alt"),
    ]
    assert stats.balanced()


@pytest.mark.parametrize(
    "html",
    [
        "<template><img src=a alt=A></template>",
        "<TEMPLATE id=x><template><img src=a alt=A></template></TEMPLATE>",
        "<table><template><tr><td><img src=a alt=A></template></table>",
        "<image src=a alt=A>",
        "<select><option>x</select><img src=a alt=A>",
        "<table><tr><img src=a alt=A></table>",
    ],
)
def test_pictures_in_odd_places(html: str) -> None:
    assert image_links(html)[1] == [("a", [("alt", "A")])]


@pytest.mark.parametrize(
    ("html", "charset", "text"),
    [
        ("é".encode(), "", "é"),
        ("é".encode(), "iso-8859-1", "é"),
        ("é!".encode("latin-1"), "", "é!"),
        ("“é”".encode("cp1252"), "iso-8859-1", "“é”"),
        ("é!".encode("latin-1"), "utf-8", "é!"),
        ("犬".encode("shift_jis"), "Shift_JIS", "犬"),
        (b"<meta charset=euc-kr>" + "개".encode("euc-kr"), "", "개"),
        (b'<meta content="text/html; charset=windows-1251">' + "да".encode("cp1251"), "", "да"),
        ("犬".encode("iso2022_jp"), "iso-2022-jp", "犬"),
        ("é".encode("utf-16"), "", "é"),
        ("\ufeffé".encode(), "nonsense", "é"),
        ("é!".encode("latin-1"), "hex", "é!"),
        ("é!".encode("latin-1"), "punycode", "é!"),
        ("éééééééééééé".encode()[:-1], "", "ééééééééééé"),
        ("éééééééééééé".encode() + b"\xff!", "", "éééééééééééé\ufffd!"),
        (b"<meta charset=utf-16>" + "é".encode(), "", "é"),
    ],
)
def test_encodings(html: bytes, charset: str, text: str) -> None:
    assert decoded(html, charset).rpartition(">")[2] == text


HTML = '<img src="x.jpg" alt="ein schöner Hund">'.encode()
CHUNKED = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(c), c) for c in (HTML[:9], HTML[9:])) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("payload", "headers"),
    [
        (HTML, "Content-Type: text/html; charset=utf-8"),
        (HTML, "content-type: application/xhtml+xml"),
        (HTML, "Content-Type: text/html\r\nContent-Encoding: gzip"),
        (gzip.compress(HTML, mtime=0), "Content-Type: text/html\r\nContent-Encoding: gzip"),
        (CHUNKED, "Content-Type: text/html\r\nTransfer-Encoding: chunked"),
        (HTML, "Content-Type: text/html\r\nTransfer-Encoding: chunked"),
        (b"<html>" + HTML, "Server: x"),
        (HTML.replace(b"<img", b"<image"), "Content-Type: text/html"),
        (HTML.decode().encode("latin-1"), "Content-Type: text/html; charset=iso-8859-1"),
    ],
)
def test_pages_as_crawlers_store_them(
    tmp_path: Path, extract: Extract, payload: bytes, headers: str
) -> None:
    (tmp_path / "x.warc.gz").write_bytes(b"".join(members(page(PAGE, payload, headers))))
    rows, stats = extract(warc=[f"{tmp_path}/x.warc.gz"])
    assert [(row["url"], row["text"]) for row in rows] == [
        ("http://www.a.example/news/x.jpg", "ein schöner Hund")
    ]
    assert stats.counts["pages"] == 1


def test_what_is_no_page_is_counted(tmp_path: Path, extract: Extract) -> None:
    parts = [
        record("warcinfo", PAGE, b"software: x\r\n"),
        record("request", PAGE, b"GET / HTTP/1.1\r\n\r\n"),
        record(
            "response", PAGE, b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\n\r\n" + HTML
        ),
        page(PAGE, HTML, "Content-Type: image/png"),
        page(PAGE, b"plain words <img src=x alt='some words'>", "Server: x"),
        page(PAGE, gzip.compress(HTML, mtime=0)[:10] + b"\xff" * 50, "Content-Type: text/html"),
        page(PAGE, HTML),
    ]
    (tmp_path / "x.warc.gz").write_bytes(b"".join(members(*parts)))
    rows, stats = extract(warc=[f"{tmp_path}/x.warc.gz"])
    assert len(rows) == 1
    assert stats.counts["other_records"] == 3
    assert stats.counts["bad_records"] == 1
