"""Running text of a wikitext page, fast enough for six million articles.

A handful of linear passes, some ten times as fast as a full parser: templates, tables, references
and pictures go, labels of links and what is written below pictures stay. Broken markup costs some
words, never an error.
"""

from __future__ import annotations

import re
from collections import Counter

from dataset_build.text import normalise, unescape

# Elements whose content is no prose, or not the article's own.
_CLOSED = (
    "ref|math|chem|gallery|timeline|source|syntaxhighlight|score|code|pre|nowiki|templatestyles"
    "|imagemap|hiero|graph|mapframe"
)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
# One that nothing closes ends where the next section begins.
_ELEMENT = re.compile(
    rf"<({_CLOSED})\b(?:[^<>]*/>|[^<>]*>((?:[^<\n]++|<(?!/\1\s*>)|\n(?!==))*+)(?:</\1\s*>)?)",
    re.IGNORECASE,
)
# A plain link and what it shows, a template with nothing inside: most of all that nests.
_LINK = re.compile(r"\[\[(?:[^\[\]{}|:]*\|)?([^\[\]{}|:#]*)\]\]")
_TEMPLATE = re.compile(r"\{\{[^{}\[\]]*\}\}")
# In "{{x|}}" the brace after the bar is the template's; in "|}}}" a table ends, then a template.
_NESTED = re.compile(r"(\{\{|\}\}|\{\||\|\}(?!\}(?:\}\})*(?!\}))|\[\[|\]\])")
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,500}>")
_ADDRESS = re.compile(r"\[(?:(?:https?|ftp):)?//[^\s\]|<>]+|https?://[^\s\]|<>]+|ftp://[^\s\]|<>]+")
_EMPHASIS = re.compile(r"''+")
_SWITCH = re.compile(r"__[A-Z]{3,}__")
# A full stop after a word of four letters ends a sentence; after a shorter one ("St. Louis",
# "J. S. Bach") it as likely marks an abbreviation.
_SENTENCE_END = re.compile(r"\.(?<=\w\w\w\w\.)(?!\S)")

BREAK = "."
"""Stands between words that are no neighbours."""
_BREAKS = '\n,;:!?()[]{}|=*#"'
_WIDE_BREAKS = "\u201c\u201d\u2013\u2014\u2026"  # beyond ASCII
_BYTES = {
    fold_case: bytes(
        10 if chr(i) in _BREAKS else i if i > 127 else ord(normalise(chr(i), fold_case) or " ")
        for i in range(256)
    )
    for fold_case in (False, True)
}


def words(wikitext: str, fold_case: bool = True) -> str:
    """The page's words as `normalise` gives them, in order, parted by spaces, and a `BREAK` for
    each line end and mark of punctuation, so that no bigram spans one."""
    text = _SENTENCE_END.sub("\n", plain_text(wikitext))
    for mark in _WIDE_BREAKS:
        text = text.replace(mark, "\n")
    data = text.encode("utf-8", "surrogatepass").translate(_BYTES[fold_case])
    phrases = data.decode("utf-8", "surrogatepass").split("\n")
    spelled = [p if p.isascii() else normalise(p, fold_case) for p in phrases]
    return f" {BREAK} ".join(spelled)


def plain_text(wikitext: str) -> str:
    """What a reader sees of the running text; lines stay lines."""
    text = _COMMENT.sub("", wikitext)
    text = _ELEMENT.sub(_captions, text)
    text = _without_nesting(text)
    text = _TAG.sub(" ", text)
    text = _ADDRESS.sub(" ", text)
    text = _SWITCH.sub("", _EMPHASIS.sub("", text))
    return unescape(text).replace("\u00a0", " ")


def _captions(element: re.Match[str]) -> str:
    """What an element leaves behind: a gallery its pictures' captions, all others a space."""
    if element[1].lower() != "gallery" or not element[2]:
        return " "
    lines = _without_nesting(element[2]).splitlines()  # "File:A.jpg|A dog", a picture a line
    return "\n".join(_caption(line.partition("|")[2]) for line in lines)


def _without_nesting(text: str) -> str:
    """Drop templates and tables; put the label in place of each link; drop pictures, categories."""
    text = "".join(_LINK.split(text))
    text, *rest = _NESTED.split(_TEMPLATE.sub("", text))
    kept: list[list[str]] = [[text]]  # text of each construct that is open
    opened: list[str] = []
    awaited: Counter[str] = Counter()  # closing marks of what is open
    for mark, text in zip(rest[::2], rest[1::2], strict=True):
        # Each level of links copies what is below it.
        if mark in _CLOSING and (mark != "[[" or awaited["]]"] < _DEEPEST_LINK):
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
        kept[-1].append(text)
    # A construct that nothing closes would swallow the rest of the page: its text is kept.
    return "".join(part for level in kept for part in level)


_CLOSING = {"{{": "}}", "{|": "|}", "[[": "]]"}
_DEEPEST_LINK = 20
"""Pictures have links in what is written below them; nothing nests deeper than that."""
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
    if ":" in target:
        if _PICTURE.match(target):
            return f"\n{_caption(label)}\n"  # no neighbours of the words around
        if _DROPPED.match(target):
            return " "
    if not bar:
        return inner.lstrip(":").partition("#")[0]
    return label.rpartition("|")[2]
