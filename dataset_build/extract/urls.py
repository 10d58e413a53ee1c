"""Addresses of pictures in one canonical form, so that equal addresses are equal strings.

What a browser would request (WHATWG URL): resolved against the page's base, host in lower case and
IDNA, no default port, no fragment, other characters than ASCII percent-encoded. The query stays.
"""

from __future__ import annotations

import functools
import re
from urllib.parse import quote

import idna

MAX_LENGTH = 2000
"""Longer addresses (characters) are not kept."""

# Already as it should be: the common case needs one match and no parsing.
_CANONICAL = re.compile(
    r"https?://[a-z0-9](?:[a-z0-9_-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9_-]*[a-z0-9])?)+"
    r"(?::(?!80/|443/|0)[0-9]+)?(?=/)(?!.*/(?:\.|%2[Ee]){1,2}(?:[/?]|$)|.*&(?:amp|#0?38);)[!$&-;=@-Z_a-z~%?]*"
)
_ABSOLUTE = re.compile(r"(https?):/*([^/?#]*)([^#]*)", re.IGNORECASE | re.DOTALL)
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")
_HOST = re.compile(r"([^:@\s]+?)\.?(?::([0-9]*))?")
_LABELS = re.compile(r"[a-z0-9](?:[a-z0-9_-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9_-]*[a-z0-9])?)+")
_AMPERSAND = re.compile("&(?:amp|#0?38);")
_CONTROLS = "".join(map(chr, range(0x21)))  # and the space: stripped from both ends
_REMOVED = re.compile(r"[\t\r\n\ud800-\udfff]")
_DOTS = re.compile(r"/(?:\.|%2[Ee]){1,2}(?:/|$|\?)")
_SAFE = "!$&'()*+,;=:@/?%-._~[]|"


def canonical(url: str, base: str = "") -> tuple[str, str]:
    """The canonical absolute address and "", or "" and why there is none.

    Reasons: `data_uri`, `not_http`, `bad_url`, `long_url`. `base` is the address that relative ones
    are resolved against; it must be absolute.
    """
    # Nearly all links are well-formed; what is canonical already needs no parsing.
    guess = _resolved(url, base) if url and ":" not in url else url
    if len(guess) <= MAX_LENGTH and _CANONICAL.fullmatch(guess):
        return guess, ""
    url = _REMOVED.sub("", url.strip(_CONTROLS))
    if url[:5].lower() == "data:":
        return "", "data_uri"
    if len(url) > MAX_LENGTH:
        return "", "long_url"
    if not url or url[0] == "#":  # the page itself
        return "", "bad_url"
    # Attributes of archived metadata come with their entities; "&copy=1" must stay, though.
    url = _AMPERSAND.sub("&", url)
    scheme = match.group().lower() if (match := _SCHEME.match(url)) else ""
    if scheme not in {"", "http:", "https:"}:
        return "", "not_http"
    path, question, query = url.partition("?")
    path = path.replace("\\", "/")
    # "https:x.jpg" on a page of https is relative; browsers take "https:/host/x" elsewhere.
    if scheme and scheme == _parts(base)[0].lower() and path[len(scheme) :][:2] != "//":
        path, scheme = path[len(scheme) :], ""
    url = path + question + query
    return _assembled(url if scheme else _resolved(url, base))


def of_page(url: str, base: str = "") -> tuple[str, str]:
    """A page's address, and the one that its relative links are resolved against: `base`, as the
    page's `<base>` has it, if that is an address.

    Either is "" if it is longer than any that is kept: every picture of the page would have it.
    """
    page = url if len(url) <= MAX_LENGTH else ""
    return page, (base and canonical(base, page)[0]) or page


def _resolved(url: str, base: str) -> str:
    """A link without scheme, made absolute (RFC 3986, §5.2.2); dot segments stay for later.

    `urllib` would do, but drops the empty segments of paths, which servers tell apart.
    """
    scheme, origin, folder, page = _parts(base)
    if url[:2] == "//":
        return scheme + url
    if url[:1] == "/":
        return origin + url
    return (page if url[:1] in "?#" else folder) + url


@functools.lru_cache(maxsize=64)
def _parts(base: str) -> tuple[str, str, str, str]:
    """Of an absolute address: "http:", "http://host", "http://host/path/", all but the query."""
    page = base.partition("#")[0].partition("?")[0]
    scheme, _, rest = page.partition("//")
    host, _, path = rest.partition("/")
    origin = f"{scheme}//{host}"
    return scheme, origin, f"{origin}/{path[: path.rfind('/') + 1]}", page


def _assembled(url: str) -> tuple[str, str]:
    match = _ABSOLUTE.match(url)
    if match is None:
        return "", "bad_url"
    scheme, host, rest = match[1].lower(), canonical_host(match[2]), match[3]
    if not host:
        return "", "bad_url"
    port = host.partition(":")[2]
    if port and port == {"http": "80", "https": "443"}[scheme]:
        host = host.partition(":")[0]
    if not rest.startswith("/"):
        rest = "/" + rest
    rest = without_dots(rest)
    rest = quote(rest, safe=_SAFE, errors="ignore")
    url = f"{scheme}://{host}{rest}"
    return (url, "") if len(url) <= MAX_LENGTH else ("", "long_url")


def without_dots(rest: str) -> str:
    """A path and query whose path has no "." and ".." segments any more (RFC 3986, §5.2.4)."""
    if not _DOTS.search(rest):
        return rest
    path, question, query = rest.partition("?")
    segments: list[str] = []
    *folders, name = path.split("/")[1:]
    for segment in [*folders, *([name, ""] if _DOTS.fullmatch(f"/{name}") else [name])]:
        match segment.replace("%2e", ".").replace("%2E", "."):
            case "..":
                del segments[-1:]
            case ".":
                pass
            case _:
                segments.append(segment)
    return f"/{'/'.join(segments)}{question}{query}"


@functools.lru_cache(maxsize=1 << 14)
def canonical_host(authority: str) -> str:
    """Host and port in lower case and IDNA; "" for names that no public server has."""
    match = _HOST.fullmatch(authority)
    if match is None:  # empty, or with a user's name and password
        return ""
    host = match[1].lower()
    if not host.isascii():
        try:
            host = _ascii(host)
        except UnicodeError:  # idna's errors are such
            return ""
    if len(host) > 253 or max(map(len, host.split("."))) > 63 or not _LABELS.fullmatch(host):
        return ""
    return f"{host}:{int(match[2])}" if match[2] else host


def _ascii(host: str) -> str:
    """A host name as DNS knows it: mapped by UTS 46, nontransitional, as browsers do.

    Not checked against IDNA 2008, which forbids the emoji that some names have.
    """
    labels = idna.uts46_remap(host, std3_rules=False, transitional=False).split(".")
    return ".".join(
        label if label.isascii() else f"xn--{label.encode('punycode').decode()}" for label in labels
    )


def extension(url: str) -> str:
    """The file name extension of a canonical address's path, in lower case, without the dot."""
    name = url.partition("?")[0].rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""
