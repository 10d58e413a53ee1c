"""What is kept of the image links of pages: the rules that all sources share, and the writing."""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import regex

from dataset_build.extract import languages
from dataset_build.extract.urls import canonical, extension
from dataset_build.records import CANDIDATES
from dataset_build.text import clean, normalise
from pipeline.stats import Stats

if TYPE_CHECKING:
    from dataset_build.extract import ExtractSettings

_ROW_GROUP = 1 << 16
_Row = tuple[str, str, str, str, str]  # address, text, page, source, file
_PICTURE = r"(?:jpe?g|png|gif|webp|bmp|svg|tiff?|avif|heic|jfif)"
# "holiday_02.JPG", and the names that cameras and programs give: "IMG 1234", "Photo no. 7".
_FILE_NAME = re.compile(rf"\.{_PICTURE}\W*\Z", re.IGNORECASE)
_CAMERA_NAME = re.compile(
    r"\W*(?:img|dsc[nf]?|pict?|image|photo|picture|screen ?shot|untitled|foto|bild|mvi|wp)"
    r"[\W_]*(?:no|nr|copy|edited)?[\d\W_]*",
    re.IGNORECASE,
)
# "holiday_in_rome_3" is a name of a file, "罗马假日_旅游" two headings: these write without spaces.
_UNSPACED = re.compile(r"[\u0E00-\u109F\u1780-\u17FF\u2E80-\u9FFF]")
# "https://…", "www.…", "example.com", "info@example.co.uk"; "Dr.Martens" and "Node.js" are words.
_URL = re.compile(
    r"\W*(?:(?:[a-z][a-z+]*://|www\.)\S*|"
    r"(?:[\w.+-]{1,64}@)?(?:[\w-]{1,63}\.){1,9}"
    r"(?:com|net|org|info|biz|edu|gov|eu|io|tv|me|co|us|uk|de|fr|it|es|nl|ru|pl|br|jp|cn|in|au|ca|"
    r"ch|at|be|se|no|dk|fi|cz)(?:[:/?#]\S*)?)\W*",
    re.IGNORECASE,
)
_MARKUP_SIGN = re.compile(r"[<{\[$]")
_MARKUP = re.compile(
    r"</?[a-z][^<>]*>|\{\{|\{%|<\?|\$\{|\[caption |"
    r"\{\\|\\[a-z]+ ?\{|[_^]\{",  # TeX, which Wikipedia has for its formulas
    re.IGNORECASE,
)
_LETTER = re.compile(r"[^\W\d_]")
_TWO_WORDS = re.compile(r"[A-Za-z] [A-Za-z]")
_CHARACTER = regex.compile(r"\X")  # as readers see it, with its marks (Unicode, UAX 29)
# All pictures of a figure have its caption: thousands, where a page is made to be slow.
_clean = functools.lru_cache(maxsize=16)(clean)


@functools.lru_cache(maxsize=16)
def _shortened(text: str, most: int) -> str:
    """What is kept of a clean text that is longer than `most` characters; clean as well."""
    return clean(text[: _end(text, most)])


def _end(text: str, most: int) -> int:
    """Where to cut a text that is longer than `most` characters.

    After the last word, if it ends in the second half of them; else, and where words have no
    spaces between them, after the last letter with its marks.
    """
    least = most // 2
    has_spaces = not _UNSPACED.search(text, most - 1, most + 1)
    if has_spaces and (space := text.rfind(" ", least, most + 1)) > 0:
        return space
    ends = (found.end() for found in _CHARACTER.finditer(text, least, most + 1))
    return max((end for end in ends if end <= most), default=most)


class Candidates:
    """Judges texts and addresses, and streams what passes into one parquet file.

    Every (link, text) is a row in: a link with an `alt` and a different `title` counts twice, one
    without any text once. Use as a context manager; the file is complete afterwards.
    """

    def __init__(
        self,
        target: Path,
        settings: ExtractSettings,
        snapshot: str,
        file: str = "",
        detect: languages.Detect | None = None,
    ) -> None:
        self.stats = Stats()
        self.file = file
        """Name of the file that is read now."""
        self.max_raw_chars = 16 * settings.max_chars
        """Of a raw text no more is read: white space and entities take room, but a megabyte of
        "alt" is not worth cleaning."""
        self._settings = settings
        self._denied = frozenset(name.lower().lstrip(".") for name in settings.denied_extensions)
        self._snapshot = snapshot
        self._detect = detect
        self._writer = pq.ParquetWriter(target, CANDIDATES, compression="zstd")
        self._rows: list[_Row] = []

    def __enter__(self) -> Candidates:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._writer.close()

    def link(self, url: str, texts: list[tuple[str, str]], page_url: str, base: str) -> None:
        """One image link: `texts` are (source, raw text), in order of preference."""
        seen: set[str] = set()
        for source, raw in texts:
            if raw and not raw.isspace() and raw not in seen:
                seen.add(raw)
                self.row(url, raw, source, page_url, base)
        if not seen:
            self.without_text(1)

    def without_text(self, links: int) -> None:
        """Image links that nothing is said about."""
        if links:
            self.stats.rows_in += links
            self.stats.drop("no_text", links)

    def row(self, url: str, raw: str, source: str, page_url: str, base: str = "") -> None:
        """One address with one raw text."""
        stats = self.stats
        stats.rows_in += 1
        text = _clean(raw[: self.max_raw_chars])
        if len(text) > self._settings.max_chars:
            text = _shortened(text, self._settings.max_chars)
            stats.counts["texts_cut"] += 1
        if reason := self._fault(text):
            stats.drop(reason)
            return
        address, reason = canonical(url, base)
        if not reason and extension(address) in self._denied:
            reason = "denied_extension"
        if reason:
            stats.drop(reason)
            return
        self._rows.append((address, text, page_url, source, self.file))
        if len(self._rows) >= _ROW_GROUP:
            self._flush()

    def _fault(self, text: str) -> str:
        """Why a clean text is no caption, or ""."""
        settings = self._settings
        if not text:
            return "empty_text"
        if len(text) < settings.min_chars:
            return "too_short"
        if not _LETTER.search(text):
            return "no_letter"
        # Each pattern is tried only on texts that can match: most captions meet none.
        if "." in text:
            if _FILE_NAME.search(text):
                return "file_name"
            if _URL.fullmatch(text):
                return "url_as_text"
        if len(text) < 40 and _CAMERA_NAME.fullmatch(text):
            return "file_name"
        if _MARKUP_SIGN.search(text) and _MARKUP.search(text):
            return "markup"
        if "_" in text and " " not in text and not _UNSPACED.search(text):
            return "file_name"
        # What has two words needs no count of them if no more are asked for.
        if settings.min_words == 2 and _TWO_WORDS.search(text):
            return ""
        if settings.min_words > 1 and len(normalise(text).split()) < settings.min_words:
            return "too_few_words"
        return ""

    def _flush(self) -> None:
        rows = self._in_wanted_languages(self._rows) if self._detect else self._rows
        self._rows = []
        if not rows:
            return
        self.stats.rows_out += len(rows)
        urls, texts, pages, sources, names = zip(*rows, strict=True)
        columns = {
            "url": urls,
            "text": texts,
            "page_url": pages,
            "source": sources,
            "snapshot": [self._snapshot] * len(urls),
            "file": names,
        }
        for source, many in Counter(sources).items():
            self.stats.observe("source", source, many)
        self._writer.write_table(pa.table(columns, schema=CANDIDATES))

    def _in_wanted_languages(self, rows: list[_Row]) -> list[_Row]:
        assert self._detect
        codes = languages.of([row[1] for row in rows], self._detect)
        for code, many in Counter(codes).items():
            self.stats.observe("language", code or "unknown", many)
        wanted = frozenset(self._settings.languages)
        kept = [row for row, code in zip(rows, codes, strict=True) if code in wanted]
        if len(kept) < len(rows):
            self.stats.drop("other_language", len(rows) - len(kept))
        return kept
