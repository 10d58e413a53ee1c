"""What the pages of a run have in common: templates that escape, one style, formats of numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import charts

if TYPE_CHECKING:
    from jinja2 import Environment

_UNKNOWN = "\u2013"


def environment(folder: Path) -> Environment:
    """Templates of `folder`, which may include `pages.css`; everything put in is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"n": number, "size": size, "pct": percent, "short": charts.short}
    return made


def number(value: float | None, digits: int = 0) -> str:
    """With separators; an en dash for what is not known."""
    return _UNKNOWN if value is None else f"{value:,.{digits}f}"


def size(value: float | None) -> str:
    """Bytes in the unit that suits, powers of 1000."""
    if value is None:
        return _UNKNOWN
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:,.1f} {unit}"
    return f"{value:,.0f} B"


def percent(part: float | None, whole: float | None = 1.0) -> str:
    """`part` of `whole`; never rounds something to nothing, nor nearly all to all."""
    if part is None or not whole:
        return _UNKNOWN
    share = part / whole
    if 0 < share < 0.0005:
        return "<0.1%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{share:.1%}"
