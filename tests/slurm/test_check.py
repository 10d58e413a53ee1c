"""slurm-check finds what a cluster lacks, or what is asked of it in vain, before a run does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slurm import check, nodes
from slurm.check import Finding
from slurm.probe import Seen
from slurm.settings import Resources, SlurmSettings
from tests.cluster import local_slurm
from tests.cluster.local_slurm import Cluster

ROOT = Path(__file__).parents[2]

CONFIG = check.parse_config("""Configuration data as of 2026-01-01T00:00:00
AccountingStorageEnforce = associations,limits
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = big
MaxArraySize            = 11
MaxJobCount             = 500
PreemptParameters       = (null)
PreemptType             = preempt/partition_prio
SLURM_VERSION           = 23.11.4
SlurmctldParameters     = idle_on_node_suspend

Slurmctld(primary) at head is UP
""")

PARTITIONS = check.parse_lines(
    "PartitionName=cpu Default=YES DefaultTime=00:10:00 GraceTime=0 MaxTime=1-12:00:00"
    " PreemptMode=CANCEL State=UP TotalCPUs=64 TotalNodes=2\n"
    "PartitionName=gpu Default=NO DefaultTime=NONE GraceTime=300 MaxTime=UNLIMITED"
    " PreemptMode=REQUEUE State=UP TotalCPUs=512 TotalNodes=8\n"
    "PartitionName=old Default=NO DefaultTime=NONE GraceTime=0 MaxTime=UNLIMITED"
    " PreemptMode=OFF State=DOWN TotalCPUs=4 TotalNodes=1\n"
)
GPUS = check.parse_gpus("cpu|(null)\ngpu|gpu:a100:4(S:0-1)\ngpu|gpu:h100:8(S:0-1),nic:2\nold|gpu:2")


def to_do(findings: list[Finding]) -> dict[str, str]:
    return {finding.what: finding.advice for finding in findings if finding.must}


def with_resources(**resources: object) -> SlurmSettings:
    return SlurmSettings(stages={"train": Resources.model_validate(resources)})


def test_limits_below_the_settings_name_the_setting_and_its_value() -> None:
    found = list(check.of_limits(CONFIG, SlurmSettings()))
    assert to_do(found) == {
        "MaxArraySize": "set slurm.max_array: 10",
        "MaxJobCount": "set slurm.max_submitted below 500",
    }
    follows = SlurmSettings(max_array=10, max_submitted=499)
    assert not to_do(list(check.of_limits(CONFIG, follows)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("00:01:00", 1),
        ("1-12:00:00", 36 * 60),
        ("UNLIMITED", float("inf")),
        ("NONE", float("inf")),
        ("00:00:30", 0.5),
    ],
)
def test_time_limits_are_read_in_minutes(text: str, expected: float) -> None:
    assert check.minutes(text) == expected


def test_gpus_are_those_of_the_best_node() -> None:
    assert GPUS == {"cpu": 0, "gpu": 8, "old": 2}


@pytest.mark.parametrize(
    ("resources", "where", "advice"),
    [
        ({"partition": "gpus"}, "gpus", "set slurm.stages.train.partition to one of cpu, gpu, old"),
        ({"time_minutes": 2161}, "cpu", "set slurm.stages.train.time_minutes: 2160"),
        ({"time_minutes": 2160}, "cpu", ""),
        ({"partition": "gpu", "gpus": 9}, "gpu", "its nodes have 8: lower slurm.stages.train.gpus"),
        ({"partition": "gpu", "gpus": 8}, "gpu", ""),
        ({"gpus": 1}, "cpu", "its nodes have 0: lower slurm.stages.train.gpus"),
        ({"partition": "cpu,old"}, "old", "it is DOWN: choose another"),
    ],
)
def test_what_a_stage_asks_of_its_partition(
    resources: dict[str, object], where: str, advice: str
) -> None:
    found = to_do(list(check.of_requests(PARTITIONS, GPUS, with_resources(**resources))))
    if advice:
        assert found.keys() == {f"slurm.stages.train in {where}"}
        assert found.popitem()[1].startswith(advice)
    else:
        assert not found


def test_without_a_default_partition_one_must_be_named() -> None:
    found = to_do(list(check.of_requests(PARTITIONS[1:], GPUS, SlurmSettings())))
    assert found == {"slurm.default in no partition": "set slurm.default.partition"}


def test_partitions_say_what_preemption_costs() -> None:
    cpu, gpu, old = check.of_partitions(CONFIG, PARTITIONS, GPUS)
    assert "attempts" in cpu.advice
    assert "at most 2160 min" in cpu.found
    assert not gpu.advice, "five minutes are enough to save"
    assert "preempted" not in old.found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SlurmctldParameters", "enable_configless,preempt_send_user_signal"),
        ("PreemptParameters", "youngest_first,send_user_signal"),
    ],
)
def test_both_spellings_of_the_signal_at_preemption_are_known(key: str, value: str) -> None:
    assert "SIGTERM alone" in check.of_preemption(CONFIG).found
    assert "SIGUSR2" in check.of_preemption({**CONFIG, key: value}).found


def test_limits_of_the_user_come_from_accounts_and_qualities_of_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sacctmgr that prints what SLURM's prints with `--parsable2`."""
    program = tmp_path / "sacctmgr"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in *assoc*) printf "lab||normal,long\\nguest|40|normal\\n";;'
        ' *qos*) printf "normal|200\\nlong|\\n";; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = list(check.of_user(CONFIG, SlurmSettings(default=Resources(account="guest"))))
    assert [finding.found for finding in found] == [
        "QOS normal: 200 in the queue",
        "account guest: 40 in the queue",
    ]
    assert to_do(found) == {"jobs of a user": "set slurm.max_submitted: 40, if jobs use it"}
    assert not to_do(list(check.of_user(CONFIG, SlurmSettings(max_submitted=40))))


@pytest.mark.parametrize(
    ("given", "seen_by_torch", "advice"),
    [(8, 8, ""), (0, 8, "gres.conf"), (8, 0, "driver"), (8, 7, "driver")],
)
def test_gpus_must_be_given_and_seen(given: int, seen_by_torch: int, advice: str) -> None:
    seen = Seen(("train",), asked_gpus=8, gpus=given, torch_gpus=seen_by_torch)
    (gpus,) = (finding for finding in check.of_job(seen) if "GPUs" in finding.found)
    assert gpus.must == bool(advice)
    assert advice in gpus.advice


@pytest.fixture
def fits(cluster: Cluster) -> SlurmSettings:
    """What the test cluster can do."""
    return SlurmSettings(default=Resources(partition="normal", memory_gb=1))


def jobs_to_do(
    settings: SlurmSettings, place: Path, patience_s: float = 60
) -> dict[str, tuple[str, str]]:
    """What jobs found that must be put right: what was found, and the advice."""
    findings = check.check(settings, place, patience_s)
    assert not list(place.iterdir()), "the files of the check stay behind"
    return {f.what: (f.found, f.advice) for f in findings if f.must}


@pytest.mark.slurm
def test_the_command_says_fine_and_0_or_what_to_do_and_2(cluster: Cluster, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "slurm-check"]
    run = ["--run", str(tmp_path / "runs" / "x")]
    fine = subprocess.run([*command, *run], cwd=ROOT, capture_output=True, text=True)
    assert fine.returncode == 0, fine.stdout + fine.stderr
    assert "the cluster has all that runs need" in fine.stdout
    assert cluster.run("sinfo", "--version").split()[1] in fine.stdout
    assert "files go both ways" in fine.stdout
    assert "may submit jobs" in fine.stdout
    wrong = ["configs/sample.yaml", *run, "slurm.max_array=5000", "slurm.stages.train.gpus=2"]
    unfit = subprocess.run([*command, *wrong], cwd=ROOT, capture_output=True, text=True)
    assert unfit.returncode == check.EXIT_UNFIT
    assert "set slurm.max_array: 1000" in unfit.stdout
    assert "2 GPUs asked for, 2 given" in " ".join(unfit.stdout.split())
    left = cluster.run("squeue", "--noheader", "--states=PENDING,RUNNING")
    assert not left, "its jobs are gone"


@pytest.mark.slurm
def test_a_job_that_fails_before_it_begins_is_quoted(fits: SlurmSettings, tmp_path: Path) -> None:
    settings = fits.model_copy(update={"setup": ("echo no module cuda here; exit 1",)})
    ((found, advice),) = jobs_to_do(settings, tmp_path).values()
    assert found == "ended as FAILED, exit code 1:0; its last words: no module cuda here"
    assert "slurm.setup" in advice


@pytest.mark.slurm
def test_a_cluster_that_is_busy_is_not_waited_for(
    cluster: Cluster, fits: SlurmSettings, tmp_path: Path
) -> None:
    cluster.wait(cluster.occupy(), "RUNNING")
    ((found, _),) = jobs_to_do(fits, tmp_path, patience_s=1).values()
    assert found.startswith("still waits after 1 s: ")
    assert len(cluster.run("squeue", "--noheader").splitlines()) == 1, "ours is cancelled"


@pytest.mark.slurm
def test_a_folder_that_nodes_do_not_share_is_found_out(
    cluster: Cluster, fits: SlurmSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not local_slurm.can_hide():
        pytest.skip("only root may mount something for one node")
    monkeypatch.setattr("slurm.probe._VISIBLE_S", 1)
    extra = fits.default.model_copy(update={"extra": ("--nodelist=n4",)})
    settings = fits.model_copy(update={"default": extra})
    assert not jobs_to_do(settings, tmp_path)
    cluster.clear()  # a node that dies while a job of it ends is waited for, for a minute
    cluster.kill_node("n4")
    cluster.start_node("n4", hidden=tmp_path)
    try:
        ((found, advice),) = jobs_to_do(settings, tmp_path).values()
    finally:
        cluster.clear()
        cluster.kill_node("n4")
        cluster.start_node("n4")
    assert f"nothing that it wrote is here in {tmp_path}" in found
    assert "the same on all nodes" in advice


@pytest.mark.slurm
@pytest.mark.parametrize("program", ["sbatch", "scontrol"])
def test_commands_that_jobs_may_not_use(
    fits: SlurmSettings, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, program: str
) -> None:
    """Without sbatch, WAIT=1 does; without scontrol, nothing is queued again."""
    programs = tmp_path_factory.mktemp("programs")
    (programs / program).write_text("#!/bin/sh\necho only on login nodes >&2\nexit 1\n")
    (programs / program).chmod(0o755)
    settings = fits.model_copy(update={"setup": (f"export PATH={programs}:$PATH",)})
    findings = [f for f in check.check(settings, tmp_path, 60) if "only on login nodes" in f.found]
    assert len(findings) == 1
    assert findings[0].must == (program == "scontrol")
    assert ("WAIT=1" if program == "sbatch" else "slurm.setup") in findings[0].advice


@pytest.mark.parametrize(
    ("resources", "advice"),
    [
        (
            {"memory_gb": 64},
            "its nodes have 16 GiB: set slurm.stages.train.memory_gb to that or less",
        ),
        ({"memory_gb": 16, "cpus": 8, "constraint": "a100|h100"}, ""),
        ({"cpus": 20}, "its nodes have 8 cores: set slurm.stages.train.cpus: 8"),
        (
            {"cpus": 4, "processes_per_node": 4},
            "its nodes have 8 cores for 4 processes: set slurm.stages.train.cpus: 2",
        ),
        ({"constraint": "v100"}, "they have a100, ib: change slurm.stages.train.constraint"),
    ],
)
def test_what_no_node_has_names_the_setting(resources: dict[str, object], advice: str) -> None:
    there = nodes.parse("n1|cpu|8|16384|a100,ib\nn2|cpu|4|8192|(null)\nn3|gpu|64|999999|v100")
    found = to_do(list(check.of_requests(PARTITIONS, GPUS, with_resources(**resources), there)))
    assert found == ({"slurm.stages.train in cpu": advice} if advice else {})


@pytest.mark.parametrize(
    ("train_nodes", "advice", "must"),
    [((8, 8), "set train.nodes: 2", True), ((1, 4), "uses 2 at most", False), ((2, 2), "", False)],
)
def test_training_needs_as_many_nodes_as_there_are(
    train_nodes: tuple[int, int], advice: str, must: bool
) -> None:
    (found,) = check.of_training(PARTITIONS, SlurmSettings(), train_nodes)
    assert advice in found.advice and found.must == must and bool(found.advice) == bool(advice)


def test_a_job_must_have_time_to_save() -> None:
    found = to_do(list(check.of_time(SlurmSettings(default=Resources(time_minutes=2)))))
    (advice,) = found.values()
    assert advice == "set slurm.default.time_minutes: 9 or more, or lower slurm.signal_seconds"
    assert not list(check.of_time(SlurmSettings(default=Resources(time_minutes=3))))
