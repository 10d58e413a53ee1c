"""The cluster that other tests stand on: it comes, it is nobody else's, and it goes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import local_slurm
from tests.cluster.keeper import descendants
from tests.cluster.local_slurm import Cluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(local_slurm.missing()), reason=local_slurm.missing()),
]

ROOT = Path(__file__).parents[2]

STARTER = """
import time
from tests.cluster.local_slurm import start
with start(nodes=2) as cluster:
    job = cluster.submit("setsid sleep 600 & echo begun; exec sleep 600")
    cluster.until(lambda: cluster.output(job), "the job to begin")
    print(cluster.folder, flush=True)
    time.sleep(60)
"""


def listening(pids: set[int]) -> set[str]:
    """Local addresses, as hexadecimal text of /proc/net/tcp, on which processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(str(link.readlink()))
            except OSError:
                continue
    rows = [
        line.split()
        for table in ("tcp", "tcp6", "udp", "udp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    # Fields of proc_net_tcp: 1 is address:port, 3 the state (0A listens), 9 the inode.
    return {
        row[1].split(":")[0]
        for row in rows
        if f"socket:[{row[9]}]" in inodes and (row[3] == "0A" or row[2].endswith(":0000"))
    }


def test_its_daemons_listen_on_loopback_only(cluster: Cluster) -> None:
    daemons = set(descendants(cluster.keeper.pid))
    assert len(daemons) >= 5
    assert listening(daemons) == {"0100007F"}, "127.0.0.1, in the machine's byte order"


def test_its_folder_is_private(cluster: Cluster) -> None:
    assert cluster.folder.stat().st_mode & 0o777 == 0o700


def test_two_clusters_do_not_meet(cluster: Cluster) -> None:
    with local_slurm.start(nodes=2) as other:
        ours, theirs = (c.submit("sleep 60") for c in (cluster, other))
        assert ours != theirs
        assert not cluster.jobs(theirs)
        other.wait(theirs, "RUNNING")
        assert other.jobs(theirs)[0]["NodeList"] == "n1"
    assert cluster.node_states().keys() == {"n1", "n2", "n3", "n4"}
    cluster.wait(ours, "RUNNING")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_tests_are_interrupted(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as starter:
        assert starter.stdout
        folder = Path(starter.stdout.readline().decode().strip())
        keeper = int((folder / "pids" / "keeper").read_text())
        started = descendants(keeper)
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in started]
        assert sum(b"sleep\x00600" in command for command in commands) == 2
        starter.send_signal(number)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in [keeper, *started]):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.05)
    assert not folder.exists()


def test_it_goes_up_and_down_from_the_shell() -> None:
    script = f"""
        set -e
        eval "$({sys.executable} -m tests.cluster up --nodes 1 MaxArraySize=7)"
        echo "$SLURM_CONF"
        sinfo --noheader --Node --format=%N,%t,%P --partition=urgent
        scontrol show config | grep MaxArraySize
        {sys.executable} -m tests.cluster down
    """
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    conf, node, setting = done.stdout.split("\n", 2)
    assert node == "n1,idle,urgent"
    assert setting.split() == ["MaxArraySize", "=", "7"]
    assert not Path(conf).exists()
