"""A WAT file of any size for `benchmarks.extract`, made up from real pages.

260 real news and blog pages are turned into what Common Crawl's extractor says of a page: its head,
and its links in order, with entities, as `ia-web-commons` writes them; headers and the records of
request and crawler are those of a real WAT of 2014. Each time a page is drawn it is another one:
every word of four letters or more becomes another of the same length, script and case, every number
another, the same one throughout the page, so that addresses and texts differ and a record still
compresses as a page's does (it is a gzip member, so that no two of them compress together).

Of a page's links a run of random length is kept, some 7 KB compressed a page (CC-MAIN-2018-39:
18.5 TiB of WAT for 2.8 billion pages). Of pictures with a text a share loses it, so that two of
five have one (cc2dataset: 88 of 229 billion). One page in ten has none, which is an assumption.
"""

from __future__ import annotations

import functools
import html
import json
import multiprocessing
import os
import random
import re
import string
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastwarc.warc import ArchiveIterator, WarcRecordType
from selectolax.lexbor import LexborHTMLParser, LexborNode

from dataset_build.extract.html import decoded
from pipeline.config import MissingInput

_WAT, _PAGES = "commoncrawl-2014-35.warc.wat", "news-pages-260.warc.gz"
_CHUNK = 200  # pages
_KEPT_LINKS = 0.85  # of a page, on average
_KEPT_TEXTS = 0.6  # of pictures that have one
_WITH_PICTURES = 0.9  # of pages
_HTML = '"HTML-Metadata":0'
_TARGET = "http://0pointer.de/photos/?gallery=Australia&photo=496"  # the page in the real WAT
# What an element says of others, in the extractor's words: its tag, the attribute with the address
# and those that it keeps beside.
_LINKS = {
    "a": ("href", "title", "target", "rel"),
    "img": ("src", "alt", "title", "width", "height"),
    "form": ("action", "method"),
    "iframe": ("src",),
    "link": ("href", "rel", "type"),
    "script": ("src", "type"),
}
_HEAD = {"link": "Link", "script": "Scripts"}
_IDENTITY = re.compile(r"sha1:[A-Z2-7]{32}|urn:uuid:[0-9a-f-]{36}")
# In JSON: names and paths, escapes and entities, which stay; words and numbers.
_TOKEN = re.compile(
    r'"[\w-]+":(?:"[A-Z]+@/\w+")?|\\u....|\\.|&#?\w+;|data:[^"]*|%[0-9A-F]{2}'
    r"|[^\W\d_]{4,}|\d{2,}"
)
_WORD = re.compile(r"[^\W\d_]{4,}")
_STAYS = frozenset(["http", "https", "html", "jpeg", "webp", "image", "images", "index"])


@dataclass(frozen=True)
class _Page:
    """What is said of a page, as JSON."""

    url: str
    links: list[tuple[str, str]]
    """In order; of a picture with a text, a second form without."""
    head: str
    records: list[str]
    """Of request, response and crawler; the second has `_HTML` where links and head go."""


def write(folder: Path, sizes: Sequence[int]) -> list[Path]:
    """Files of at least so many bytes each; a smaller one is how a larger one begins.

    Raises `MissingInput` where the real inputs are not.
    """
    paths = [folder / f"CC-MAIN-2024-10-{size >> 20:04d}.warc.wat.gz" for size in sizes]
    missing = [(path, size) for path, size in zip(paths, sizes, strict=True) if not path.exists()]
    if not missing:
        return paths
    _pages()  # before the processes fork
    files = [(path.with_suffix(".part").open("wb"), path, size) for path, size in missing]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        chunks = pool.imap(_chunk, range(max(sizes) // _CHUNK // 1000 + 1))
        for chunk in chunks:
            for part, path, size in list(files):
                part.write(chunk)
                if part.tell() >= size:
                    part.close()
                    Path(part.name).rename(path)
                    files.remove((part, path, size))
            if not files:
                break
    assert not files, "pages are smaller than thought"
    return paths


def _chunk(number: int) -> bytes:
    """Some pages' records, each a gzip member."""
    draw = random.Random(number)
    pages = _pages()
    return b"".join(_members(draw.choice(pages), draw) for _ in range(_CHUNK))


def _members(page: _Page, draw: random.Random) -> bytes:
    names = _Names(draw)
    length = round(len(page.links) * min(1.0, draw.expovariate(1 / _KEPT_LINKS)))
    start = draw.randint(0, len(page.links) - length)
    pictures = draw.random() < _WITH_PICTURES
    links = ",".join(
        bare if bare and draw.random() > _KEPT_TEXTS else link
        for link, bare in page.links[start : start + length]
        if pictures or "IMG@" not in link
    )
    said = names.of(f'"HTML-Metadata":{{"Links":[{links}],"Head":{page.head}}}')
    target = names.of(page.url)
    return b"".join(
        _member(target, names.identify(record.replace(page.url, target)).replace(_HTML, said), draw)
        for record in page.records
    )


def _member(target: str, body: str, draw: random.Random) -> bytes:
    payload = body.encode()
    head = (
        f"WARC/1.0\r\nWARC-Type: metadata\r\nWARC-Target-URI: {target}\r\n"
        f"WARC-Date: 2024-02-21T04:21:14Z\r\nWARC-Record-ID: <{_identity(draw)}>\r\n"
        f"WARC-Refers-To: <{_identity(draw)}>\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    packer = zlib.compressobj(6, wbits=31)
    return packer.compress(head.encode() + payload + b"\r\n\r\n") + packer.flush()


def _identity(draw: random.Random) -> str:
    return f"urn:uuid:{uuid.UUID(int=draw.getrandbits(128), version=4)}"


class _Names(dict[str, str]):
    """What words, numbers and identities are called this time; drawn on first sight."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    def of(self, text: str) -> str:
        return _TOKEN.sub(lambda found: self[found[0]], text)

    def identify(self, text: str) -> str:
        return _IDENTITY.sub(lambda found: self[found[0]], text)

    def __missing__(self, token: str) -> str:
        new = token
        if token.startswith("sha1:"):
            new = "sha1:" + "".join(self.draw.choices(string.ascii_uppercase, k=32))
        elif token.startswith("urn:"):
            new = _identity(self.draw)
        elif token.isdecimal():
            new = "".join(self.draw.choices(string.digits, k=len(token)))
        elif _WORD.fullmatch(token) and token not in _STAYS:
            new = self.draw.choice(_words()[_kind(token)])
        self[token] = new
        return new


def _kind(word: str) -> tuple[int, bool, str]:
    case = "lower" if word.islower() else "title" if word.istitle() else ""
    return min(len(word), 12), word.isascii(), case


@functools.cache
def _words() -> dict[tuple[int, bool, str], list[str]]:
    """The words of all pages, by length, script and case."""
    found: dict[str, None] = {}
    for page in _pages():
        for text in (page.url, page.head, *(link for link, _ in page.links)):
            found.update((token, None) for token in _TOKEN.findall(text) if _WORD.fullmatch(token))
    kinds: dict[tuple[int, bool, str], list[str]] = {}
    for word in found:
        kinds.setdefault(_kind(word), []).append(word)
    return kinds


@functools.cache
def _pages() -> list[_Page]:
    name = os.environ.get("OPENWIT_DATA")
    if not name:
        raise MissingInput("$OPENWIT_DATA is not set: it names the folder of real inputs")
    folder = Path(name) / "webarchive"
    for path in (folder / _WAT, folder / _PAGES):
        if not path.exists():
            raise MissingInput(f"{path} is missing: $OPENWIT_DATA must name a folder with it")
    with (folder / _WAT).open("rb") as raw:
        bodies = [record.reader.read() for record in ArchiveIterator(raw, parse_http=False)]
    request, response, crawler = (
        json.loads(body) for body in bodies[1:] if _TARGET.encode() in body
    )
    with (folder / _PAGES).open("rb") as raw:
        return [
            _page(
                record.headers["WARC-Target-URI"],
                LexborHTMLParser(decoded(record.reader.read(), "")),
                (request, response, crawler),
            )
            for record in ArchiveIterator(raw, record_types=WarcRecordType.response)
        ]


def _page(url: str, tree: LexborHTMLParser, records: tuple[Any, Any, Any]) -> _Page:
    links: list[tuple[str, str]] = []
    head: dict[str, Any] = {}
    if title := tree.css_first("title"):
        head["Title"] = title.text(strip=True)
    if (base := tree.css_first("base[href]")) is not None:
        head["Base"] = base.attributes["href"]
    head["Metas"] = [
        {name: value for name in ("name", "property", "content") if (value := given.get(name))}
        for given in (node.attributes for node in tree.css("meta"))
    ]
    for node in tree.css(",".join(f"{tag}[{kept[0]}]" for tag, kept in _LINKS.items())):
        link = _link(node)
        if (section := _HEAD.get(node.tag or "")) is not None:
            head.setdefault(section, []).append(link)
            continue
        bare = {name: value for name, value in link.items() if name not in ("alt", "title")}
        has_text = bool(link.get("alt") or link.get("title")) and node.tag == "img"
        links.append((_json(link), _json(bare) if has_text else ""))
    texts = []
    for record in records:
        said = json.loads(_json(record).replace(_json(_TARGET)[1:-1], _json(url)[1:-1]))
        about = said["Envelope"]["Payload-Metadata"].get("HTTP-Response-Metadata")
        if about is not None:
            about["HTML-Metadata"] = 0
        texts.append(_json(said))
    return _Page(url, links, _json(head), texts)


def _link(node: LexborNode) -> dict[str, str]:
    """An element's address and what it says of it, entities as they are written."""
    tag = str(node.tag)
    address, *others = _LINKS[tag]
    given: Callable[[str], str | None] = node.attributes.get
    link = {
        "path": f"{tag.upper()}@/{address}",
        "url": html.escape(given(address) or "", quote=False),
    }
    if tag == "a" and (text := node.text(strip=True)):
        link["text"] = text
    for name in others:
        if (value := given(name)) is not None:
            link[name] = html.escape(value, quote=False)
    return link


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
