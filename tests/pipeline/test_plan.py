"""From tasks and rates to hours, memory, bytes and jobs."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from pipeline import plan
from pipeline.config import ConfigError
from pipeline.plan import Batch, Ledger, Plan, Work
from pipeline.rates import Figure, Line, Rate, Rates


def ledger() -> Ledger:
    rate = Rate("rows", Line(2, 0.1), Line(100, 1), Line(0, 10), 3, 5, 50, "a pilot")
    return Ledger(
        Rates(
            {"a.b": rate, "a.c": rate},
            {"start_s": Figure(1, "a clock"), "stage_s": Figure(0.5, "a clock")},
        )
    )


def work(*phases: Batch, **more: float) -> Work:
    return Work("a", "rows", 10, 8, tuple((phase,) for phase in phases), 77, **more)


def tasks(*units: float, kind: str = "a.b", **more: float) -> Batch:
    return Batch(kind, np.array(units, np.float64), **more)  # type: ignore[arg-type]


def test_a_stage_costs_the_sum_of_its_tasks() -> None:
    cost = plan.cost(work(tasks(10, 20, 30), tasks(100, kind="a.c")), ledger(), cores=3)
    # 3 + 4 + 5 s and 12 s, a second more each for its process
    assert cost.busy_s == pytest.approx(24)
    assert cost.core_hours * 3600 == pytest.approx(28)
    assert cost.wall_s == pytest.approx(6 + 13 + 0.5)
    assert cost.memory_mb == 200
    assert cost.kept_bytes == 1600
    assert cost.files == 4 * (3 + 2)
    assert (cost.tasks, cost.rows_in, cost.rows_out, cost.read_bytes) == (4, 10, 8, 77)


def test_the_network_may_be_slower_than_the_processor() -> None:
    assert plan.cost(work(tasks(10, least_s=5.0)), ledger(), cores=1).busy_s == 50
    assert plan.cost(work(tasks(10), least_s=900), ledger(), cores=1).wall_s == 900


def test_connections_bound_the_tasks_at_the_same_time() -> None:
    many = tasks(*[10] * 8)
    narrow = Batch(many.kind, many.units, workers=2)
    assert plan.cost(work(many), ledger(), 8).wall_s == pytest.approx(4 + 0.5)
    assert plan.cost(work(narrow), ledger(), 8).wall_s == pytest.approx(4 * 4 + 0.5)


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 50])
def test_tasks_begin_as_workers_become_free(workers: int) -> None:
    seconds = np.random.default_rng(workers).random(40) + 0.1
    clock, running = 0.0, []
    for took in seconds:
        if len(running) == workers:
            clock = min(running)
            running.remove(clock)
        running.append(clock + took)
    assert plan.wall_s(seconds, workers) == pytest.approx(max(running))
    assert plan.wall_s(np.full(40, 2.0), workers) == 2 * -(-40 // workers)


@pytest.mark.parametrize(
    ("task_s", "tasks", "workers", "per_job"),
    [
        (60, 10_000, 100, 60),  # an hour at most, then the next job
        (60, 10_000, 1000, 10),  # as many jobs as cores
        (60, 100, 1000, 10),  # no job shorter than ten minutes
        (7200, 100, 10, 1),  # a task is not cut
        (1, 5, 10, 5),  # all there is
    ],
)
def test_a_job_lasts_ten_minutes_to_an_hour(
    task_s: float, tasks: int, workers: int, per_job: int
) -> None:
    jobs = plan.jobs_of("a.b", np.full(tasks, float(task_s)), workers)
    assert jobs.tasks_per_job == per_job
    assert jobs.jobs == -(-tasks // per_job)
    assert jobs.job_s == per_job * task_s


def test_what_nobody_measured_is_not_made_up() -> None:
    with pytest.raises(ConfigError, match=r"no pack\.shard task .* --from"):
        plan.cost(work(tasks(1, kind="pack.shard")), ledger(), 1)
    with pytest.raises(ConfigError, match=r"picture_bytes; give --from"):
        ledger().figure("picture_bytes")


def test_extrapolation_is_said() -> None:
    book = ledger()
    plan.cost(work(tasks(149)), book, 1)
    assert book.notes == []
    plan.cost(work(tasks(200)), book, 1)
    assert book.notes[0].startswith("a.b: tasks of 200 rows, 4 times the largest measured (50)")


def test_every_number_that_was_used_is_printed_with_its_origin() -> None:
    book = ledger()
    book.given("pairs", 400e6, "given")
    costs = (plan.cost(work(tasks(10)), book, 2),)
    answer = Plan(costs, 2, {"download: received bytes": 52e12}, book)
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(answer.lines())
    text = console.export_text()
    for words in ("a clock", "a pilot", "given", "400 M", "52 TB", "a.b"):
        assert words in text, words
    values = json.loads(json.dumps(answer.to_json()))
    assert values["figures"]["pairs"] == {"value": 400e6, "source": "given"}
    assert values["total"]["core_hours"] == pytest.approx(4 / 3600)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0034, "0.0034"), (1234, "1,234"), (56_100, "56.1 k"), (1.2e9, "1.2 G")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert plan.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.5 s"), (600, "10 min"), (9000, "2.5 h"), (864_000, "10 d")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert plan.duration(seconds) == text
