"""Numbers as people read them."""

from __future__ import annotations

from pipeline.pages import percent, size


def test_numbers_for_people() -> None:
    assert percent(1, 100_000) == "<0.1%"
    assert percent(99_999, 100_000) == ">99.9%"
    assert (percent(0, 7), percent(7, 7), percent(1, 0)) == ("0.0%", "100.0%", "\N{EN DASH}")
    assert (size(999), size(1_500_000), size(None)) == ("999 B", "1.5 MB", "\N{EN DASH}")
