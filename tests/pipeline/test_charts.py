"""Charts are well-formed SVG whose pixels follow the data."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from pipeline.charts import POINTS, Axis, Series, columns, lines, short, thin


def _points(svg: str) -> list[tuple[float, float]]:
    polyline = next(e for e in ET.fromstring(svg).iter() if e.tag == "polyline")
    pairs = (pair.split(",") for pair in polyline.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


def test_a_power_law_is_a_straight_line_on_two_logarithmic_axes() -> None:
    svg = lines(
        [Series("a", [[1, 1000], [10, 100], [100, 10], [1000, 1]])],
        title="t",
        x_label="x",
        y_label="y",
        log=True,
    )
    (x0, y0), (x1, y1), *_, (x3, y3) = _points(svg)
    assert x3 - x0 == pytest.approx(3 * (x1 - x0), abs=0.3)
    assert y3 - y0 == pytest.approx(3 * (y1 - y0), abs=0.3)
    assert y1 > y0  # downwards: fewer


def test_what_a_logarithm_has_no_place_for_is_left_out() -> None:
    series = [Series("a", [[1, 5], [2, 0], [3, 2]])]
    assert len(_points(lines(series, title="", x_label="", y_label="", log=True))) == 2
    assert lines([Series("a", [[1, 0]])], title="", x_label="", y_label="", log=True) == ""


@pytest.mark.parametrize("points", [[[5, 3]], [[0, 0]], [[1, -2], [2, -2]], [[0, 1e-9], [1, 1e12]]])
def test_degenerate_data_still_draws(points: list[list[float]]) -> None:
    svg = lines([Series("a", points)], title="", x_label="", y_label="")
    assert "nan" not in svg.lower()
    assert len(_points(svg)) == len(points)


def test_column_heights_are_proportional() -> None:
    bars = [
        float(e.attrib["height"])
        for e in ET.fromstring(columns({"a": 10, "b": 5, "c": 0}, title="", x_label="")).iter(
            "rect"
        )
    ]
    assert bars[0] == pytest.approx(2 * bars[1], abs=0.2)
    assert bars[2] == 0
    assert columns({}, title="", x_label="") == ""


def test_labels_are_escaped() -> None:
    svg = columns({"<script>": 1}, title='"><b>', x_label="a & b")
    ET.fromstring(svg)
    assert "<script>" not in svg
    assert "<b>" not in svg


def test_events_are_drawn_where_they_were() -> None:
    series = [Series("a", [(0, 1), (100, 2)])]
    events = [50, 101]  # the axis ends at 105
    svg = lines(series, title="", x_label="", y_label="", events=events, width=272)
    marks = [node for node in ET.fromstring(svg).iter() if node.get("class") == "event"]
    axis = Axis(0, 105, 58, 258, False)
    assert [mark.get("x1") for mark in marks] == [f"{axis(50):.1f}", f"{axis(101):.1f}"]
    svg = lines(series, title="", x_label="", y_label="", events=[106])
    assert "event" not in svg


def test_ticks_are_round_and_inside() -> None:
    assert Axis(0, 9.3, 0, 100, False).ticks() == [0, 2, 4, 6, 8]
    assert Axis(3, 20_000, 0, 100, True).ticks() == [10, 100, 1000, 10_000]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (1000, "1k"), (3124, "3.1k"), (99_960, "100k"), (4e8, "400M"),
     (999_950, "1M"), (1.28e10, "12.8G"), (0.2, "0.2"), (2.5e-4, "2.5e-4"), (3e-6, "3e-6")],
)  # fmt: skip
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_thinning_averages_neighbours() -> None:
    points = [(float(step), float(step % 2)) for step in range(1, 1201)]
    thinned = thin(points)
    assert len(thinned) == POINTS
    assert {value for _, value in thinned} == {0.5}
    assert thinned[-1][0] == 1200
    assert thin([]) == []


def test_an_axis_writes_its_numbers_in_one_way_and_says_if_it_is_logarithmic() -> None:
    def said(top: float, *, log: bool = False) -> tuple[list[str | None], list[str | None]]:
        points = [[1, top / 2], [10, top]]
        svg = lines([Series("a", points)], title="", x_label="x", y_label="y", log=log)
        texts = [e for e in ET.fromstring(svg).iter() if e.tag == "text"]
        ticks = [e.text for e in texts if e.get("text-anchor") == "end"]
        return ticks, [e.text for e in texts if e.get("class") == "label"]

    assert said(2e-3)[0] == ["1e-3", "1.5e-3", "2e-3"]
    assert said(0.5)[0] == ["0.3", "0.4", "0.5"]
    assert said(0.5)[1] == ["x", "y"]
    assert said(0.5, log=True)[1] == ["x, logarithmic", "y, logarithmic"]
