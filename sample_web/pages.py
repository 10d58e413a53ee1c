"""Web pages that cite the pictures: which page has which, and its HTML with all HTML's variety."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sample_web import dirt
from sample_web.pairs import ALBUM, Cited, address_of, home, mirror_of, repeats, text_of
from sample_web.vocabulary import COMMON, EVENTS, HOSTS, PLACES, draw, number, pick

if TYPE_CHECKING:
    from sample_web.stage import SampleWebSettings

LAZY = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
"""What a page shows until its script loads the picture."""
_MIRRORED = 100  # pictures on a page of repetitions: what large galleries have


@dataclass(frozen=True)
class Image:
    """One `<img>`, its attributes as the page writes them (entities escaped)."""

    source: str
    alt: str
    kind: str
    title: str = ""
    lazy: str = ""
    """The address in `data-src`, when a script is to load the picture."""
    figcaption: str = ""


@dataclass(frozen=True)
class Page:
    """A page of the archive."""

    url: str
    title: str
    base: str
    """`<base href>`, or ""."""
    images: tuple[Image, ...]
    links: tuple[tuple[str, str], ...]
    """(href, text), as written."""


def pages(settings: SampleWebSettings, file: int) -> Iterator[Page]:
    """The pages of one archive file, in order; memory does not grow with their number."""
    albums = -(-len(range(file, settings.pairs, settings.archive_files)) // ALBUM)
    extra = _extras(settings, file)
    total = sum(1 for _ in _extras(settings, file))
    given = 0
    for album in range(albums):
        first = album * ALBUM * settings.archive_files + file
        stop = min(settings.pairs, first + ALBUM * settings.archive_files)
        numbers = range(first, stop, settings.archive_files)
        cited = [
            Cited(address_of(settings, index).url, text_of(settings, index))
            for index in numbers
            if home(settings, index) == file
        ]
        due = total * (album + 1) // albums - given
        given += due
        cited += itertools.islice(extra, due)
        host = address_of(settings, first).host
        yield _page(settings, host, f"{file}-{album}", cited)
    for position, block in enumerate(_blocks(_mirrored(settings, file), _MIRRORED)):
        host = HOSTS[position % len(HOSTS)]
        yield _page(settings, host, f"{file}-m{position}", block)


def markup(page: Page) -> str:
    """The page's HTML."""
    lines = ["<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">']
    lines.append(f"<title>{page.title}</title>")
    if page.base:
        lines.append(f'<base href="{page.base}">')
    lines.append('<link rel="stylesheet" href="/style.css"></head><body>')
    lines.append(f"<h1>{page.title}</h1>")
    lines += (f'<p><a href="{href}">{text}</a></p>' for href, text in page.links)
    for image in page.images:
        tag = f'<img src="{image.source}" alt="{image.alt}"'
        tag += f' title="{image.title}"' if image.title else ""
        tag += f' data-src="{image.lazy}" loading="lazy">' if image.lazy else ">"
        if image.figcaption:
            tag = f"<figure>{tag}<figcaption>{image.figcaption}</figcaption></figure>"
        lines.append(tag)
    return "\n".join([*lines, "<p>All rights reserved.</p></body></html>\n"])


def mirrored(settings: SampleWebSettings) -> int:
    """How many repetitions fill the web up to `settings.candidates`."""
    if not settings.candidates:
        return 0
    known = settings.pairs + sum(dirt.all_counts(settings).values())
    return max(0, settings.candidates - known)


def _extras(settings: SampleWebSettings, file: int) -> Iterator[Cited]:
    """What a file cites besides its own pictures: repetitions and dirt, mixed."""
    own_dirt = (
        fault.cited
        for fault in dirt.faults(settings)
        if not dirt.in_pool(fault) and fault.number % settings.archive_files == file
    )
    for pair in itertools.zip_longest(repeats(settings, file), own_dirt):
        yield from (cited for cited in pair if cited)


def _mirrored(settings: SampleWebSettings, file: int) -> Iterator[Cited]:
    for copy in range(file, mirrored(settings), settings.archive_files):
        address, index = mirror_of(settings, copy)
        yield Cited(address.url, text_of(settings, index, 10 + copy), "mirror")


def _blocks(cited: Iterator[Cited], size: int) -> Iterator[list[Cited]]:
    while block := list(itertools.islice(cited, size)):
        yield block


def _page(settings: SampleWebSettings, host: str, name: str, cited: list[Cited]) -> Page:
    seed = settings.seed
    place = pick(PLACES, seed, "page", name).title()
    event = pick(EVENTS, seed, "event", name)
    folder = f"/{pick(COMMON, seed, 'folder', name)}/{name}/"
    url = f"http://{host}{folder}"
    base = ""
    if draw(seed, "base", name) < 0.12:
        base = pick(("/", f"http://{host}/", "../../"), seed, "form", name)
    images = tuple(
        _image(settings, host, folder, base, one, f"{name}.{position}")
        for position, one in enumerate(cited)
    )
    links = tuple(
        (
            f"http://{pick(HOSTS, seed, 'a', name, n)}/",
            f"{pick(COMMON, seed, 't', name, n)} &amp; more",
        )
        for n in range(number(seed, "links", name) % 4)
    )
    return Page(url, f"{place} {event}", base, images, links)


def _image(
    settings: SampleWebSettings, host: str, folder: str, base: str, cited: Cited, name: str
) -> Image:
    source = html.escape(_written(settings, host, folder, base, cited.url, name))
    alt, title, caption, lazy = html.escape(cited.text), "", "", ""
    # Dirt and repetitions are written plainly, so that their numbers hold for every extractor.
    if not cited.kind:
        form = draw(settings.seed, "form", name)
        if form < settings.lazy_share:
            source, lazy = LAZY, source
        elif form < 0.1:
            alt, title = "", alt
        elif form < 0.2:
            title = html.escape(pick(PLACES, settings.seed, "title", name).title())
        elif form < 0.28:
            caption = alt
        elif form < 0.34:
            alt = alt.replace(" ", "&nbsp;", 1).replace("-", "&#45;")
    return Image(source, alt, cited.kind, title, lazy, caption)


def _written(
    settings: SampleWebSettings, host: str, folder: str, base: str, url: str, name: str
) -> str:
    """The address as the page writes it: absolute, or shorter where that means the same."""
    form = draw(settings.seed, "written", name)
    if not url.startswith("http://") or ".example" not in url or form < 0.4:
        return url
    parts = urlsplit(url)
    path = url[len(f"http://{parts.netloc}") :]
    if form < 0.5 or parts.netloc != host:
        return f"//{parts.netloc}{path}"
    if form < 0.75:
        return path
    # The base of relative addresses is the site's root where <base> says so, else the folder.
    depth = 0 if base else folder.count("/") - 1
    return "../" * depth + path.removeprefix("/")
