"""Hourly page views in the format of the real files."""

from __future__ import annotations

import gzip
from typing import Any
from urllib.parse import unquote

from sample_web import encyclopedia


def lines(web: Any) -> dict[str, list[list[str]]]:
    found = {}
    for path in sorted((web.out / "pageviews").iterdir()):
        text = gzip.decompress(path.read_bytes()).decode()
        found[path.name] = [line.split(" ") for line in text.splitlines()]
    return found


def test_files_are_named_by_the_hour_and_hold_four_fields(web: Any) -> None:
    found = lines(web)
    assert list(found) == ["pageviews-20260105-000000.gz", "pageviews-20260105-010000.gz"]
    for rows in found.values():
        assert all(len(row) == 4 and row[2].isdecimal() and row[3].isdecimal() for row in rows)
        assert {"en", "en.m", "de"} <= {row[0] for row in rows}
        assert rows == sorted(rows, key=lambda row: " ".join(row))


def test_titles_are_those_of_the_encyclopedia(web: Any) -> None:
    titles = {t for t, _ in encyclopedia.titles(web.settings.seed, web.settings.articles)}
    written = [row[1] for row in lines(web)["pageviews-20260105-000000.gz"] if row[0] == "en"]
    known = [t for t in written if unquote(t).replace("_", " ") in titles]
    assert len(known) > 0.6 * len(titles)
    assert any("%" in title for title in known)
    assert any("_" in title for title in known)


def test_some_pages_are_read_far_more_than_others(web: Any) -> None:
    views = sorted(int(r[2]) for r in lines(web)["pageviews-20260105-000000.gz"] if r[0] == "en.m")
    assert views[-1] > 30 * views[0]
