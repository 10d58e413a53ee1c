"""Running text of a wikitext page, fast enough for six million articles.

A handful of linear passes, some ten times as fast as a full parser: templates, tables, references
and pictures go, labels of links and what is written below pictures stay. Broken markup costs some
words, never an error.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator

# Elements whose content is no prose, or not the article's own.
_CLOSED = (
    "ref|math|chem|gallery|timeline|source|syntaxhighlight|score|code|pre|nowiki|templatestyles"
    "|imagemap|hiero|graph|mapframe"
)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_ELEMENT = re.compile(
    rf"<({_CLOSED})\b(?:[^<>]*/>|[^<>]*>(.*?)(?:</\1\s*>|(?=\n==)|\Z))",
    re.DOTALL | re.IGNORECASE,
)
_NESTED = re.compile(r"\{\{|\}\}|\{\||\|\}|\[\[|\]\]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,500}>")
_ADDRESS = re.compile(r"\[?\b(?:https?:)?//[^\s\]|<>]+")
_EMPHASIS = re.compile(r"'{2,}|__[A-Z]{3,}__")
# A full stop after a word of four letters ends a sentence; after a shorter one ("St. Louis",
# "J. S. Bach") it as likely marks an abbreviation.
_PHRASE = re.compile(
    r"[\n,;:!?()\[\]{}|=*#\"\u201c\u201d\u2013\u2014\u2026]+|(?<=\w\w\w\w)\.(?=\s|\Z)"
)


def phrases(wikitext: str) -> Iterator[str]:
    """The page's text cut at line ends and punctuation, so that no bigram spans a boundary."""
    for phrase in _PHRASE.split(plain_text(wikitext)):
        if phrase and not phrase.isspace():
            yield phrase


def plain_text(wikitext: str) -> str:
    """What a reader sees of the running text; lines stay lines."""
    text = _COMMENT.sub("", wikitext)
    text = _ELEMENT.sub(_captions, text)
    text = _without_nesting(text)
    text = _TAG.sub(" ", text)
    text = _ADDRESS.sub(" ", text)
    text = _EMPHASIS.sub("", text)
    return html.unescape(text).replace("\u00a0", " ")


def _captions(element: re.Match[str]) -> str:
    """What an element leaves behind: a gallery its pictures' captions, all others a space."""
    if element[1].lower() != "gallery" or not element[2]:
        return " "
    lines = _without_nesting(element[2]).splitlines()  # "File:A.jpg|A dog", a picture a line
    return "\n".join(_caption(line.partition("|")[2]) for line in lines)


def _without_nesting(text: str) -> str:
    """Drop templates and tables; put the label in place of each link; drop pictures, categories."""
    kept: list[list[str]] = [[]]  # text of each construct that is open
    opened: list[str] = []
    awaited: Counter[str] = Counter()  # closing marks of what is open
    position = 0
    while match := _NESTED.search(text, position):
        kept[-1].append(text[position : match.start()])
        position = match.end()
        mark = match.group()
        if mark == "|}" and (not opened or opened[-1] != "{|"):  # "{{x|}}" ends no table
            position -= 1
            continue
        if mark in _CLOSING:
            opened.append(mark)
            awaited[_CLOSING[mark]] += 1
            kept.append([])
        elif awaited[mark]:
            while _CLOSING[opened[-1]] != mark:  # what was left open inside ends here
                awaited[_CLOSING[opened.pop()]] -= 1
                kept.pop()
            inner = "".join(kept.pop())
            awaited[mark] -= 1
            if opened.pop() == "[[":
                kept[-1].append(_label(inner))
    kept[-1].append(text[position:])
    # A construct that nothing closes would swallow the rest of the page: its text is kept.
    return "".join(part for level in kept for part in level)


_CLOSING = {"{{": "}}", "{|": "|}", "[[": "]]"}
_PICTURE = re.compile(r"\s*(?:file|image)\s*:", re.IGNORECASE)
# How a picture is shown, where another would have the text below it (Help:Pictures).
_OPTION = re.compile(
    r"\s*(?:thumb|thumbnail|frame|framed|frameless|border|left|right|center|centre|none|baseline"
    r"|middle|sub|super|(?:text-)?(?:top|bottom)|upright|\d*(?:x\d+)?\s*px"
    r"|(?:thumb|upright|alt|link|page|class|lang|loop|muted|start|end|thumbtime)\s*=.*)\s*",
    re.IGNORECASE | re.DOTALL,
)
# Categories, pages about pages, and links to other languages ("de:", "zh-yue:").
_DROPPED = re.compile(
    r"\s*:?(?:file|image|media|category|template|wikipedia|simple|[a-z]{2,3}|[a-z]+-[a-z-]+)\s*:",
    re.IGNORECASE,
)


def _caption(options: str) -> str:
    """What is written below a picture, the last of what its link says; "" for none."""
    caption = options.rpartition("|")[2]
    return "" if _OPTION.fullmatch(caption) else caption


def _label(inner: str) -> str:
    target, bar, label = inner.partition("|")
    if _PICTURE.match(target):
        return f"\n{_caption(label)}\n"  # no neighbours of the words around
    if _DROPPED.match(target):
        return " "
    if not bar:
        return inner.lstrip(":").partition("#")[0]
    return label.rpartition("|")[2]
