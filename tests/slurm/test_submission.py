from __future__ import annotations

import os
from pathlib import Path

import pytest

from slurm import queue
from slurm.batches import Batch, _reason
from slurm.job import job_memory_gb
from slurm.queue import End
from slurm.submission import SubmissionFailed, clean_environment
from tests.slurm.conftest import ToyRun


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


@pytest.mark.parametrize(
    ("end", "log", "expected"),
    [
        (
            End("FAILED", "137:0", "205M a node"),
            "slurmstepd: error: Step 7.0 exceeded memory limit (2147483648 > 1073741824), killed",
            "its job 7 was killed for memory: it held 2 GiB, its limit was 1 GiB;"
            " raise slurm.stages.extract.memory_gb",
        ),
        (
            End("OUT_OF_MEMORY", "0:125", "2G a core"),
            "",
            "its job 7 was killed for memory (it had 2G a core);"
            " raise slurm.stages.extract.memory_gb",
        ),
        (
            End(),
            "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.",
            "its job 7 was killed for memory; raise slurm.stages.extract.memory_gb",
        ),
        (
            End("FAILED", "137:0", "4G a node"),
            "",
            "its job 7 ended as FAILED, killed (SIGKILL) as jobs are that take too much memory (it"
            " had 4G a node); if nobody else killed it, raise slurm.stages.extract.memory_gb",
        ),
        (End("FAILED", "1:0", "4G a node"), "", "its job 7 ended as FAILED, exit code 1"),
        (End("NODE_FAIL", "0:15"), "", "its job 7 ended as NODE_FAIL, by signal 15"),
    ],
)
def test_of_a_job_killed_for_memory_the_reason_names_what_to_raise(
    tmp_path: Path, end: End, log: str, expected: str
) -> None:
    batch = Batch(tmp_path / "extract-00000.json", "extract", "extract.0", "0", [[]], 0.0, job="7")
    batch.folder.mkdir()
    batch.log(0).write_text(log)
    assert _reason(batch, 0, end, stopped=0) == expected


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("slurm", "said", "advice"),
    [
        (
            {"default": {"partition": "nope"}},
            "invalid partition",
            "set slurm.default.partition to one of normal, short, urgent",
        ),
        (
            {"stages": {"numbers": {"memory_gb": 64}}},
            "memory",
            "change slurm.stages.numbers.memory_gb",
        ),
        ({"default": {"cpus": 20}}, "cpu count", "change slurm.default.cpus"),
        ({"default": {"constraint": "a100"}}, "invalid feature", "change slurm.default.constraint"),
        ({"default": {"extra": "--nonsense=1"}}, "unrecognized", "change slurm.default.extra"),
    ],
)
def test_what_sbatch_refuses_is_said_once_with_the_setting(
    toy_run: ToyRun, slurm: dict[str, object], said: str, advice: str
) -> None:
    toy_run.configure({"count": 1}, slurm)
    code, words = toy_run.build("--wait")
    (line,) = (line for line in words.splitlines() if said in line.lower())
    assert code == SubmissionFailed.exit_code
    assert "numbers: sbatch refused its jobs: " in line and line.endswith(f"; {advice}")
