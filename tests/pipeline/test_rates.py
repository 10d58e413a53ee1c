"""Rates: lines through what tasks cost, and the ones that are shipped."""

from __future__ import annotations

import pytest

from pipeline import rates
from pipeline.rates import Figure, Line, Observation, Rate, Rates


def task(units: float, seconds: float, kind: str = "match.match") -> Observation:
    return Observation(kind, "rows", units, seconds, 100 + units, 10 * units, 2)


def known(fixed: float, per_unit: float, most: float) -> dict[str, Rate]:
    line = Line(fixed, per_unit)
    return {"match.match": Rate("rows", line, line, line, 1, 3, most, "known")}


def test_what_a_task_takes_at_least_and_what_grows_are_told_apart() -> None:
    seen = [task(units, 3 + 0.5 * units) for units in (10, 20, 40)]
    rate = rates.fit(seen, {}, "here")["match.match"]
    assert rate.seconds.fixed == pytest.approx(3)
    assert rate.seconds.per_unit == pytest.approx(0.5)
    assert rate.memory_mb.at(1000) == pytest.approx(1100)
    assert (rate.tasks, rate.most_units, rate.files, rate.source) == (3, 40, 2, "here")


def test_kinds_are_fitted_each_by_itself() -> None:
    seen = [task(10, 1), task(20, 2), task(10, 7, "match.matcher")]
    fitted = rates.fit(seen, {}, "here")
    assert fitted["match.match"].seconds.at(10) == pytest.approx(1)
    assert fitted["match.matcher"].seconds.at(10) == pytest.approx(7)


def test_equal_tasks_keep_the_proportions_that_are_known() -> None:
    """At 100 units known tasks take 4 + 1 s; those seen take twice as long, so both parts do."""
    line = rates.fit([task(100, 9), task(100, 11)], known(4, 0.01, 100), "here")
    assert line["match.match"].seconds.fixed == pytest.approx(8)
    assert line["match.match"].seconds.per_unit == pytest.approx(0.02)


def test_tiny_tasks_do_not_say_what_large_ones_take() -> None:
    """Noise of half a second between 10 and 30 rows is not 25 ms a row."""
    seen = [task(10, 1.0), task(30, 1.5)]
    line = rates.fit(seen, known(1.0, 1e-6, 1e6), "here")["match.match"].seconds
    assert line.at(1e6) < 5


def test_where_nothing_is_known_equal_tasks_grow_as_a_whole() -> None:
    assert rates.fit([task(10, 5)], {}, "here")["match.match"].seconds == Line(0, 0.5)


def test_no_part_is_negative_and_the_sum_is_the_measured_one() -> None:
    for times in ((5.0, 1.0), (0.1, 9.0)):
        seen = [task(units, took) for units, took in zip((10, 100), times, strict=True)]
        line = rates.fit(seen, {}, "here")["match.match"].seconds
        assert line.fixed >= 0
        assert line.per_unit >= 0
        assert line.at(10) + line.at(100) == pytest.approx(sum(times))


def test_tasks_without_a_size_cost_what_they_cost() -> None:
    assert rates.fit([task(0, 2), task(0, 4)], {}, "here")["match.match"].seconds == Line(3, 0)


def test_a_file_of_rates_reads_back() -> None:
    whole = Rates(known(1, 2, 3), {"start_s": Figure(1.5, "here")})
    assert Rates.from_json(whole.to_json()) == whole


def test_what_is_measured_stands_above_what_is_shipped() -> None:
    above = Rates(known(1, 2, 3), {"start_s": Figure(1.5, "run")})
    below = Rates({**known(9, 9, 9), "pack.shard": known(5, 5, 5)["match.match"]}, {})
    both = above.over(below)
    assert both.kinds["match.match"].seconds == Line(1, 2)
    assert both.kinds["pack.shard"].seconds == Line(5, 5)


def test_shipped_rates_say_where_they_are_from() -> None:
    shipped = rates.shipped()
    sources = [rate.source for rate in shipped.kinds.values()]
    sources += [figure.source for figure in shipped.figures.values()]
    known = ("measured by us: python -m benchmarks rates", "reference: ", "assumed: ")
    assert [source for source in sources if not source.startswith(known)] == []
    assert all(rate.seconds.at(rate.most_units) > 0 for rate in shipped.kinds.values())
