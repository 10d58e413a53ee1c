"""The made-up world's encyclopedia, as a MediaWiki export (version 0.11) compressed with bzip2.

Articles on colours, shapes, patterns, their combinations and the world's places, in wikitext with
what real articles have: templates, links, references, tables, comments. Words that belong together
("north meadow", "red circle") meet more often than chance has them.
"""

from __future__ import annotations

import bz2
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from sample_web import scenes
from sample_web.vocabulary import (
    ADJECTIVES,
    COMMON,
    CRAFTS,
    EVENTS,
    MATERIALS,
    OBJECTS,
    PLACES,
    VERBS,
    number,
)

_NAMESPACES = {-2: "Media", -1: "Special", 0: "", 1: "Talk", 2: "User", 3: "User talk"}
_NAMESPACES |= {4: "Shapepedia", 6: "File", 10: "Template", 14: "Category"}
_LETTERS = "bcdfghklmnprstvwz"


@dataclass(frozen=True)
class Article:
    """One page of the dump."""

    title: str
    text: str
    namespace: int = 0
    redirect: str = ""


def titles(seed: int, articles: int) -> list[tuple[str, str]]:
    """(title, what it is of) of every article: colour, shape, pattern, combination, place, …"""
    found = [("Main Page", "main")]
    found += [(name.capitalize(), "colour") for name in scenes.COLOURS]
    found += [(name.capitalize(), "shape") for name in scenes.SHAPES]
    found += [(name.capitalize(), "pattern") for name in scenes.PATTERNS[1:]]
    found += [(name.capitalize(), "combination") for name in scenes.seen_classes()]
    found += [(name.title(), "place") for name in PLACES]
    for kind, words in (("material", MATERIALS), ("object", OBJECTS), ("craft", CRAFTS)):
        found += [(word.capitalize(), kind) for word in words]
    found += [(f"{place.title()} {event}", "event") for place in PLACES for event in EVENTS]
    fixed = 1 + 23 + len(scenes.seen_classes()) + len(PLACES)
    if articles < len(found):
        rest = sorted(found[fixed:], key=lambda pair: number(seed, "title", pair[0]))
        found = found[:fixed] + rest
    return found[:articles]


def write(path: Path, seed: int, articles: int) -> int:
    """Write the dump; the number of its pages."""
    count = 0
    with bz2.open(path, "wt", encoding="utf-8", newline="\n") as stream:
        stream.write(_head())
        for count, article in enumerate(_pages(seed, articles), start=1):
            stream.write(_page(article, count))
        stream.write("</mediawiki>\n")
    return count


def _pages(seed: int, articles: int) -> Iterator[Article]:
    """Articles, redirects, and the pages of other namespaces among them."""
    for position, (title, kind) in enumerate(titles(seed, articles)):
        rng = random.Random(f"article/{seed}/{title}")
        yield Article(title, _text(title, kind, rng))
        if position % 9 == 4:
            other = f"The {title.lower()}"
            yield Article(other, f"#REDIRECT [[{title}]] {{{{R from other name}}}}", redirect=title)
        if position % 11 == 6:
            yield Article(f"Talk:{title}", "Is this really so? ~~~~ signed junkword", 1)
        if position % 23 == 3:
            text = "{| class='infobox' \n| {{{1|}}}\n|}<noinclude>documentation</noinclude>"
            yield Article(f"Template:{kind.capitalize()} {position}", text, 10)
    yield Article("Category:Shapes", "[[Category:Things]]", 14)
    yield Article("File:Red.svg", "A file with {{PD-self}}", 6)


def _text(title: str, kind: str, rng: random.Random) -> str:
    """The wikitext of an article: an infobox, a lead, sections, perhaps a table, categories."""
    name = title.lower() if kind not in ("place", "event") else title
    lines = [f"{{{{Infobox {kind} | name = {title} | image = {title}.svg | size = 200px }}}}"]
    lines.append(f"'''{title}''' is {_what(kind)}. {_sentences(name, rng, 5)}")
    for heading in rng.sample(("History", "Use", "Making", "In [[art]]", "Names"), 3):
        lines.append(f"\n== {heading} ==")
        lines.append(_sentences(name, rng, rng.randint(4, 9)))
        if rng.random() < 0.3:
            lines.append(f"<!-- somebody should check {_junk(rng)} -->")
    if rng.random() < 0.4:
        rows = "\n|-\n".join(f"| {rng.choice(OBJECTS)} || {rng.randint(1, 900)}" for _ in range(4))
        lines.append(f'{{| class="wikitable"\n! Thing !! Number\n|-\n{rows}\n|}}')
    if rng.random() < 0.5:
        words = rng.sample(OBJECTS, 3)
        lines.append(
            "\n== List ==\n" + "\n".join(f"* [[{word}]]s and [[{name}]]" for word in words)
        )
    lines.append(f"\n== References ==\n{{{{reflist}}}}\n\n[[Category:{kind.capitalize()}s]]")
    return "\n".join(lines)


def _what(kind: str) -> str:
    return {
        "main": "the first page of this encyclopedia",
        "colour": "a [[colour]] of paint and light",
        "shape": "a [[shape]] of geometry",
        "pattern": "a [[pattern]] on a surface",
        "combination": "a common figure in pictures for children",
        "place": "a place in the [[North country|north country]]",
        "material": "a [[material]] of many crafts",
        "object": "an everyday thing",
        "craft": "a craft",
        "event": "a yearly event",
    }[kind]


def _sentences(name: str, rng: random.Random, count: int) -> str:
    return " ".join(_decorated(rng.choice(_FORMS)(name, rng), rng) for _ in range(count))


def _decorated(sentence: str, rng: random.Random) -> str:
    """A sentence with a reference, an entity, an external link or a junk word, or plain."""
    mark = rng.random()
    if mark < 0.12:
        book = f"{{{{cite book|title={_junk(rng)}}}}}"
        return f'{sentence}<ref name="r{rng.randint(1, 99)}">{book}</ref>'
    if mark < 0.15:
        return f"{sentence}<ref>[http://www.{_junk(rng)}.example/ {_junk(rng)}]</ref>"
    if mark < 0.19:
        return sentence.replace(" ", "&nbsp;", 1)
    if mark < 0.23:
        return f"{sentence} It was called ''{_junk(rng)}'' in {rng.randint(1400, 2020)}."
    return sentence


def _junk(rng: random.Random) -> str:
    return "".join(rng.choice(_LETTERS) + rng.choice("aeiou") for _ in range(rng.randint(2, 5)))


def _linked(words: str, rng: random.Random) -> str:
    """Plain, linked, or linked under another name."""
    mark = rng.random()
    if mark < 0.25:
        return f"[[{words}]]"
    return f"[[{words.capitalize()}|{words}]]" if mark < 0.4 else words


def _figure(rng: random.Random) -> str:
    name = rng.choice(scenes.seen_classes())
    return f"{rng.choice(scenes.PATTERNS[1:])} {name}" if rng.random() < 0.25 else name


def _place(rng: random.Random) -> str:
    return rng.choice(PLACES).title()


def _on_figures(name: str, rng: random.Random) -> str:
    relation = rng.choice(scenes.RELATIONS)
    one, other = _linked(_figure(rng), rng), _figure(rng)
    return f"One {rng.choice(OBJECTS)} shows a {one} {relation} a {other}."


def _on_pictures(name: str, rng: random.Random) -> str:
    kind = rng.choice(("photo", "drawing", "picture", "illustration", "poster", "stock image"))
    verb, thing = rng.choice(VERBS), rng.choice(COMMON)
    return f"A {kind} of a {_figure(rng)} from {_place(rng)} {verb} the {thing}."


def _on_backgrounds(name: str, rng: random.Random) -> str:
    ground = rng.choice(list(scenes.BACKGROUNDS))
    return (
        f"The {_figure(rng)} on a {ground} background is a {rng.choice(ADJECTIVES)} sign of {name}."
    )


def _on_name(name: str, rng: random.Random) -> str:
    verb, thing = rng.choice(VERBS), rng.choice(COMMON)
    return f"In {_linked(_place(rng), rng)} the {name} {verb} the {rng.choice(ADJECTIVES)} {thing}."


def _on_craft(name: str, rng: random.Random) -> str:
    craft, material = rng.choice(CRAFTS).capitalize(), rng.choice(MATERIALS)
    return f"{craft} in {material} made the {material} {rng.choice(OBJECTS)} of {_place(rng)}."


def _on_events(name: str, rng: random.Random) -> str:
    verb, thing = rng.choice(VERBS), f"{rng.choice(ADJECTIVES)} {rng.choice(COMMON)}"
    return f"The {rng.choice(EVENTS)} at {_place(rng)} {verb} a {thing}."


def _on_children(name: str, rng: random.Random) -> str:
    return f"Hand-drawn by a child, the {_figure(rng)} became clip art and vector art for kids."


_FORMS: tuple[Callable[[str, random.Random], str], ...] = (
    _on_figures,
    _on_figures,
    _on_pictures,
    _on_pictures,
    _on_backgrounds,
    _on_name,
    _on_name,
    _on_craft,
    _on_events,
    _on_children,
)


def _head() -> str:
    spaces = "\n".join(
        f'      <namespace key="{key}" case="first-letter">{name}</namespace>'
        if name
        else f'      <namespace key="{key}" case="first-letter" />'
        for key, name in _NAMESPACES.items()
    )
    schema = "http://www.mediawiki.org/xml/export-0.11"
    return f"""<mediawiki xmlns="{schema}/" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" \
xsi:schemaLocation="{schema}/ {schema}.xsd" version="0.11" xml:lang="en">
  <siteinfo>
    <sitename>Shapepedia</sitename>
    <dbname>enwiki</dbname>
    <base>http://encyclopedia.example/wiki/Main_Page</base>
    <generator>sample_web</generator>
    <case>first-letter</case>
    <namespaces>
{spaces}
    </namespaces>
  </siteinfo>
"""


def _page(article: Article, number: int) -> str:
    redirect = f"\n    <redirect title={_quoted(article.redirect)} />" if article.redirect else ""
    size = len(article.text.encode())
    return f"""  <page>
    <title>{escape(article.title)}</title>
    <ns>{article.namespace}</ns>
    <id>{number}</id>{redirect}
    <revision>
      <id>{100_000 + number}</id>
      <parentid>{50_000 + number}</parentid>
      <timestamp>2026-01-02T03:{number // 60 % 60:02d}:{number % 60:02d}Z</timestamp>
      <contributor>
        <username>Editor {number % 17}</username>
        <id>{number % 17}</id>
      </contributor>
      <comment>/* Use */ a better word</comment>
      <model>wikitext</model>
      <format>text/x-wiki</format>
      <text bytes="{size}" xml:space="preserve">{escape(article.text)}</text>
      <sha1>{"0" * 31}</sha1>
    </revision>
  </page>
"""


def _quoted(text: str) -> str:
    return '"' + escape(text, {'"': "&quot;"}) + '"'
