"""What the pools of others call their columns."""

from __future__ import annotations

from typing import Literal

from pipeline.config import Settings


class Columns(Settings):
    """Where a pool keeps what; what is not given is found by its usual names."""

    url: str = ""
    """Column of addresses: url, URL, image_url …"""
    text: str = ""
    """Column of texts: text, TEXT, caption, alt …"""
    page_url: str = ""
    """Column of the pages that show the pictures: page_url …; a pool may have none."""
    names: tuple[str, ...] = ()
    """The columns of csv and tsv files, in order, if their first line does not name them."""


Known = Literal["auto", "cc3m", "cc12m", "coyo", "datacomp", "laion"]
KNOWN: dict[Known, Columns] = {
    "auto": Columns(),
    "cc3m": Columns(names=("text", "url")),
    "cc12m": Columns(names=("url", "text")),
    "coyo": Columns(url="url", text="text"),
    "datacomp": Columns(url="url", text="text"),
    "laion": Columns(url="URL", text="TEXT"),
}
