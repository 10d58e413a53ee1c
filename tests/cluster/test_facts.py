"""What of SLURM our way of running stages stands on, asked of a real one.

Where a later release of SLURM answers otherwise, these tests say what moved before users do.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.stop import EXIT_STOPPED
from tests.cluster.local_slurm import Cluster

pytestmark = pytest.mark.slurm

REQUEUE = f"""
id=$SLURM_JOB_ID
[ -z "$SLURM_ARRAY_JOB_ID" ] || id=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
[ $code -ne {EXIT_STOPPED} ] || scontrol requeue $id
exit $code
"""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def lines(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1] if path.exists() else []


def test_the_signal_of_preemption_reaches_steps_only_and_the_shell_can_requeue(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Of three processes that wait for SIGUSR2, only the one below srun gets it."""
    said = tmp_path / "said"
    waiting = f"trap 'echo $0 told >>{said}; exit {EXIT_STOPPED}' USR2; echo $0 waits >>{said};"
    waiting += " while :; do sleep 0.1; done"
    script = f"""
        if [ "$SLURM_RESTART_COUNT" ]; then echo again $SLURM_RESTART_COUNT >>{said}; exit 0; fi
        trap 'echo shell told >>{said}' USR2
        bash -c "{waiting}" bare &
        srun bash -c "{waiting}" step
        code=$?
        kill %1
        {REQUEUE}
    """
    job = cluster.submit(script.replace("$0", r"\$0"), "--signal=USR2@60", "--time=60")
    cluster.until(lambda: len(lines(said)) == 2, "both processes to wait")
    urgent = cluster.occupy()
    cluster.until(lambda: "step told" in lines(said), "the signal")
    cluster.wait(job, "PENDING")
    cluster.wait(urgent, "RUNNING")
    cluster.run("scancel", urgent)
    cluster.wait(job, "COMPLETED")
    assert sorted(lines(said)[:2]) == ["bare waits", "step waits"]
    assert lines(said)[2:] == ["step told", "again 1"]


def test_one_element_is_requeued_by_its_array_and_index_and_afterany_waits_for_all(
    cluster: Cluster, tmp_path: Path
) -> None:
    said = tmp_path / "said"
    script = f"""
        echo $SLURM_ARRAY_TASK_ID ${{SLURM_RESTART_COUNT:-0}} >>{said}
        code=0
        [ $SLURM_ARRAY_TASK_ID = 0 ] && code=1
        [ $SLURM_ARRAY_TASK_ID$SLURM_RESTART_COUNT = 1 ] && code={EXIT_STOPPED}
        {REQUEUE}
    """
    job = cluster.submit(script, "--array=0-2")
    after = cluster.submit(f"echo after >>{said}", f"--dependency=afterany:{job}")
    cluster.wait(after, *ENDED)
    *elements, last = lines(said)
    assert sorted(elements) == ["0 0", "1 0", "1 1", "2 0"], "only element 1 ran twice"
    assert last == "after", "neither the failed nor the requeued element set it off early"
    states = {entry["ArrayTaskId"]: entry["JobState"] for entry in cluster.jobs(job)}
    assert states == {"0": "FAILED", "1": "COMPLETED", "2": "COMPLETED"}


def test_a_cancelled_job_stays_cancelled_though_it_asks_to_be_run_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    said = tmp_path / "said"
    step = f"trap 'echo saved >>{said}; exit {EXIT_STOPPED}' TERM; echo waits >>{said};"
    step += " while :; do sleep 0.1; done"
    job = cluster.submit(f'srun bash -c "{step}"\ncode=$?\n{REQUEUE}')
    cluster.until(lambda: lines(said), "the step")
    cluster.run("scancel", job)
    cluster.wait(job, *ENDED)
    cluster.until(lambda: set(cluster.node_states().values()) == {"idle"}, "its end")
    (entry,) = cluster.jobs(job)
    assert (entry["JobState"], entry["Restarts"]) == ("CANCELLED", "0")
    assert lines(said) == ["waits", "saved"]


def test_the_highest_index_of_an_array_is_one_below_its_limit(cluster: Cluster) -> None:
    limit = cluster.run("scontrol", "show", "config").split("MaxArraySize")[1].split()[1]
    assert limit == "1001"
    cluster.submit("true", "--hold", "--array=0-1000")
    with pytest.raises(RuntimeError, match="Invalid job array specification"):
        cluster.submit("true", "--hold", "--array=0-1001")


def test_a_job_of_a_node_that_fell_silent_runs_again_while_its_old_processes_go_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Two attempts at one task overlap: what they write needs names of its own."""
    said, end = tmp_path / "said", tmp_path / "end"
    script = f"""
        n=${{SLURM_RESTART_COUNT:-0}}
        echo $n $SLURMD_NODENAME >>{said}
        [ $n = 1 ] && touch {tmp_path}/again
        while [ ! -e {tmp_path}/again ]; do sleep 0.1; done
        echo $n went on >>{said}
        while [ ! -e {end} ]; do sleep 0.1; done
    """
    job = cluster.submit(script)
    cluster.until(lambda: lines(said), "the first attempt")
    node = lines(said)[0].split()[1]
    cluster.kill_node(node, tasks_live=True)
    try:
        cluster.until(lambda: len(lines(said)) == 4, "both attempts at once", timeout_s=90)
    finally:
        end.touch()
        cluster.start_node(node)
    cluster.wait(job, "COMPLETED")
    second = lines(said)[1]
    assert second.split()[0] == "1"
    assert second.split()[1] != node
    assert sorted(lines(said)[2:]) == ["0 went on", "1 went on"]


def test_a_job_may_submit_a_job_once_its_own_variables_are_gone(
    cluster: Cluster, tmp_path: Path
) -> None:
    """`--mem-per-cpu` of the outer job would otherwise contradict `--mem` of the inner one."""
    said = tmp_path / "said"
    inner = tmp_path / "inner.sh"
    inner.write_text(f'#!/bin/bash\n[ -z "$OUTER" ] && srun --mem=100M echo inner >>{said}\n')
    script = f"""
        export OUTER=1
        srun --mem=100M true
        echo $? >>{said}
        for name in $(compgen -e | grep -E '^(SLURM|SBATCH)_' | grep -v SLURM_CONF); do
            unset $name
        done
        unset OUTER
        sbatch --wait --mem=200M --output={tmp_path}/inner.log {inner}
    """
    job = cluster.submit(script, "--mem-per-cpu=100M")
    cluster.wait(job, *ENDED)
    assert cluster.states(job) == ["COMPLETED"], cluster.output(job)
    assert lines(said)[-1] == "inner"
