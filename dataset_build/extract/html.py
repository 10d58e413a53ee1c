"""An HTML page's pictures with what it says about them, whatever encoding it is in."""

from __future__ import annotations

import codecs
import re
from itertools import islice

from selectolax.lexbor import LexborHTMLParser, LexborNode

# Where scripts that load pictures late keep the address, most trusted first; `src` then holds a
# placeholder.
_LAZY = (
    *("data-src", "data-lazy-src", "data-original", "data-original-src", "data-lazy"),
    *("data-img-url", "data-delayed-url"),
)
_NO_ADDRESS = re.compile(r"data:|#|//:", re.IGNORECASE)  # what `src` then may be
# How far a picture's figure is looked for upwards, and how much of a caption and of a `srcset` is
# read: in pages, not in what is made to be slow.
_MAX_LEVELS = 64
_MAX_NODES = 200
_MAX_CHARS = 20_000
_BREAKS = frozenset(["br", "div", "li", "p", "h1", "h2", "h3", "h4", "h5", "h6"])
_META = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w:.-]+)", re.IGNORECASE)
# What scripts fill a page with is no part of its tree: such a tag is read as one of no meaning.
_TEMPLATE = re.compile(r"<(/?)template(?=[\s/>])", re.IGNORECASE)
# Of `srcset`: an address that a comma ends, or one and what is said of its size (HTML, §4.8.4.2.2).
_SRCSET = re.compile(r"(\S*,)(?!\S)|(\S+)\s*([^,]*),?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)[wx]")
# What browsers take these labels for (WHATWG Encoding, §4.2).
_LABELS = {
    "iso-8859-1": "cp1252", "latin1": "cp1252", "latin-1": "cp1252", "us-ascii": "cp1252",
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso-8859-9": "cp1254", "iso-8859-11": "cp874",
    "tis-620": "cp874", "gb2312": "gb18030", "gbk": "gb18030", "x-gbk": "gb18030",
    "shift_jis": "cp932", "shift-jis": "cp932", "x-sjis": "cp932", "windows-31j": "cp932",
    "euc-kr": "cp949", "ks_c_5601-1987": "cp949", "big5": "big5hkscs",
}  # fmt: skip
# Python's own; `punycode` takes a time that is the square of a page's length.
_NO_CHARSETS = ("punycode", "idna", "unicode-escape", "raw-unicode-escape")
_SEVEN_BIT = frozenset(["iso2022_jp", "hz"])  # bytes that look like ASCII and are not

Links = tuple[str, list[tuple[str, list[tuple[str, str]]]]]


def image_links(html: str, figure_captions: bool = False) -> Links:
    """The page's base address as written, and (address, [(source, text)]) of every picture.

    The sources are `alt`, `title` and, if wanted, `figcaption`: the first one of the nearest
    `<figure>` that a picture is in, which all pictures of that figure have.
    """
    tree = LexborHTMLParser(_TEMPLATE.sub(r"<\1x-template", html))
    node = tree.css_first("base[href]")
    base = (node.attributes.get("href") or "") if node is not None else ""
    captions: dict[int, str] = {}
    for caption in tree.css("figcaption") if figure_captions else ():
        if (figure := _figure(caption)) and figure not in captions:
            captions[figure] = _text(caption)
    sources: dict[int, str] = {}
    links = []
    for image in tree.css("img"):
        given = image.attributes
        texts = [(name, text) for name in ("alt", "title") if (text := given.get(name))]
        if captions and (text := captions.get(_figure(image))):
            texts.append(("figcaption", text))
        links.append((_address(image, given, sources), texts))
    return base, links


def decoded(html: bytes, charset: str) -> str:
    """The page's text; `charset` is what the server said, "" if nothing.

    Bytes that are valid UTF-8 are UTF-8, whatever a server or page claims. Otherwise the server's
    word counts, then the page's, then windows-1252.
    """
    if html.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return html.decode("utf-16", "replace")
    names = [charset]
    if (meta := _META.search(html, 0, 4096)) is not None:
        names.append(meta[1].decode("ascii", "ignore"))
    codec = next(filter(None, map(_codec, names)), "cp1252")
    if codec not in _SEVEN_BIT:
        try:
            return codecs.utf_8_decode(html, "strict", False)[0].removeprefix("\ufeff")
        except UnicodeDecodeError:
            pass
    if codec in {"utf-8", "cp1252"}:
        codec = "utf-8" if _mostly_utf8(html) else "cp1252"
    return html.decode(codec, "replace")


def _mostly_utf8(html: bytes) -> bool:
    """Whether a page that is not valid UTF-8 is so for a few broken characters only."""
    high = len(html) - len(html.translate(None, bytes(range(128, 256))))
    return html.decode("utf-8", "replace").count("\ufffd") * 10 < high


def _codec(label: str) -> str:
    label = label.strip().strip("\"'").lower()
    try:
        name = codecs.lookup(_LABELS.get(label, label)).name
        b"<".decode(name, "replace")  # some of Python's codecs ("hex") decode no text
    except (LookupError, ValueError):
        return ""
    if name.startswith(_NO_CHARSETS):
        return ""
    # "utf-16" in a page that was read as ASCII so far cannot be true; it means UTF-8.
    return "utf-8" if name.startswith(("utf-16", "utf-32", "utf-7")) else name


def _figure(node: LexborNode) -> int:
    """Which figure is the nearest that a node is in; 0 if it is in none."""
    above = node.parent
    for _ in range(_MAX_LEVELS):
        if above is None:
            break
        if above.tag == "figure":
            return int(above.mem_id)
        above = above.parent
    return 0


def _text(caption: LexborNode) -> str:
    """What a reader sees of it; lines and paragraphs are parted by a space."""
    parts: list[str] = []
    for node in islice(caption.traverse(include_text=True), _MAX_NODES):
        if node.tag == "-text":
            if node.parent is None or node.parent.tag not in ("script", "style"):
                parts.append((node.text_content or "")[:_MAX_CHARS])
        elif node.tag in _BREAKS:
            parts.append(" ")
    return "".join(parts)[:_MAX_CHARS].strip()


def _address(image: LexborNode, given: dict[str, str | None], sources: dict[int, str]) -> str:
    """Where the picture with these attributes is: late-loading ones, `src`, the largest of
    `srcset`, then that of the `<picture>` it stands in, which `sources` remembers."""
    for name in (*_LAZY, "src"):
        url = (given.get(name) or "").strip()
        # "{width}" marks a template that a script fills in.
        if url and "{" not in url and not _NO_ADDRESS.match(url):
            return url
    if url := _largest(given):
        return url
    if (picture := image.parent) is not None and picture.tag == "picture":
        if (known := sources.get(picture.mem_id)) is None:
            known = sources[picture.mem_id] = _source(picture)
        if known:
            return known
    return given.get("src") or ""


def _source(picture: LexborNode) -> str:
    """The largest picture of the first `<source>` that has any, or ""."""
    for source in islice(picture.iter(), _MAX_LEVELS):
        if source.tag == "source" and (url := _largest(source.attributes)):
            return url
    return ""


def _largest(given: dict[str, str | None]) -> str:
    """The largest picture of a `srcset`, or ""."""
    for name in ("data-srcset", "srcset"):
        sizes = []
        for match in _SRCSET.finditer((given.get(name) or "")[:_MAX_CHARS]):
            url = (match[1] or match[2]).strip(",")
            size = _SIZE.match(match[3] or "1x")
            if url and size and url[:5].lower() != "data:":
                sizes.append((float(size[1]), url))
        if sizes:
            return max(sizes, key=lambda size: size[0])[1]
    return ""
