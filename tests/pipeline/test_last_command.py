"""How a command ended is told afterwards: by its record, by nobody, or on a full disk."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import files, last_command
from pipeline.config import MissingInput, Settings
from pipeline.executor import HandedOver
from pipeline.files import NoRoom
from pipeline.last_command import begin, lines, recorded
from pipeline.lock import RunLock
from pipeline.stage import Run
from pipeline.stop import Stopped


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, Settings())


def full(*_: Any) -> Path:
    raise OSError(errno.ENOSPC, "No space left on device")


def killed(folder: Path, on: str) -> None:
    """Have a process take the run and die of SIGKILL."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from pipeline import last_command; from pipeline.config import Settings\n"
        "from pipeline.stage import Run\n"
        "run = Run(Path(sys.argv[1]), Settings())\n"
        "with last_command.recorded(run):\n"
        "    last_command.begin(run, 'build', on=sys.argv[2])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder), on], check=False)
    assert done.returncode == -signal.SIGKILL


def test_an_end_is_told_with_its_place_and_what_goes_on(run: Run) -> None:
    with pytest.raises(MissingInput), recorded(run):
        begin(run, "build", on="slurm", waits=True)
        run.at = "match"
        raise MissingInput("there: no such input\nand more")
    stopped, again = lines(run.folder, goes_on=True)
    assert stopped.startswith("the run stopped at match (20")
    assert stopped.endswith(", exit code 3): there: no such input")
    assert again == f"to go on: make build-dataset RUN={run.folder} ON=slurm WAIT=1"
    with pytest.raises(Stopped), recorded(run):
        begin(run, "train", on="local")
        assert lines(run.folder, goes_on=False) == [], "it goes on"
        raise Stopped("SIGINT")
    stopped, again = lines(run.folder, goes_on=False)
    assert stopped.endswith("exit code 75): stopped by SIGINT")
    assert again == f"to go on: make train RUN={run.folder}"
    with recorded(run):
        begin(run, "train", on="local")
    assert lines(run.folder, goes_on=False) == []


def test_who_is_killed_has_not_said_why(run: Run) -> None:
    killed(run.folder, "local")
    stopped, _ = lines(run.folder, goes_on=False)
    assert "nobody has recorded why: `build`, process" in stopped and "was killed" in stopped


def test_what_a_cluster_has_goes_on_after_its_command(run: Run) -> None:
    killed(run.folder, "slurm")
    assert lines(run.folder, goes_on=True) == lines(run.folder, goes_on=None) == []
    assert "slurm/driver.log" in lines(run.folder, goes_on=False)[0]


def test_a_command_that_was_not_let_in_changes_no_record(run: Run) -> None:
    killed(run.folder, "local")
    before = (run.folder / "command.json").read_bytes()
    with pytest.raises(MissingInput), recorded(run):
        raise MissingInput("not built")
    with recorded(run):
        pass
    with pytest.raises(HandedOver), recorded(run):
        raise HandedOver("another drives")
    assert (run.folder / "command.json").read_bytes() == before


def test_a_full_disk_is_one_line_and_recorded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded(run):
        begin(run, "build", on="local")
    path = run.folder / "command.json"
    size = path.stat().st_size
    monkeypatch.setattr(files, "_write_temporary", full)
    with (
        pytest.raises(NoRoom, match=f"no room in {run.folder}: .* make room") as error,
        recorded(run),
    ):
        begin(run, "build", on="slurm")
        RunLock(run.folder / "slurm" / "driver.lock")
    assert error.value.exit_code == 6
    assert "exit code 6): no room in" in lines(run.folder, goes_on=False)[0]
    assert path.stat().st_size == size, "no block was needed for it"


def test_where_nothing_could_be_recorded_the_error_is_still_told(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoRoom), recorded(run):
        begin(run, "build", on="local")
        (run.folder / "command.json").unlink()
        monkeypatch.setattr(files, "_write_temporary", full)
        begin(run, "build", on="local")
    assert last_command.read(run.folder) is None
    assert lines(run.folder, goes_on=False) == []


def test_a_record_of_another_version_is_none(run: Run) -> None:
    (run.folder / "command.json").write_text(json.dumps({"name": "build", "mood": "good"}))
    assert last_command.read(run.folder) is None
