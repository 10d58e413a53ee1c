from __future__ import annotations

import os

import pytest

from slurm import queue
from slurm.job import job_memory_gb
from slurm.submission import clean_environment


def test_a_job_that_submits_does_not_pass_its_own_variables_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("SLURM_JOB_ID", "SLURM_CPU_BIND", "SBATCH_PARTITION", "PMI_RANK", "PMIX_RANK")
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    with clean_environment():
        assert not set(names) & set(os.environ)
        assert os.environ["SLURM_CONF"] == "/etc/slurm.conf"
    assert all(os.environ[name] == "1" for name in names)


@pytest.mark.parametrize(
    ("text", "indices"),
    [("7", [7]), ("0-3,9%2", [0, 1, 2, 3, 9]), ("0-1%1", [0, 1]), ("N/A", [])],
)
def test_elements_that_never_began_are_told_as_ranges(text: str, indices: list[int]) -> None:
    assert queue._indices(text) == indices


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SLURM_MEM_PER_NODE": "2048"}, 2.0),
        ({"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "4"}, 4.0),
        ({}, None),
    ],
)
def test_the_memory_of_a_job_is_what_slurm_rations(
    environ: dict[str, str], expected: float | None
) -> None:
    assert job_memory_gb(environ) == expected
