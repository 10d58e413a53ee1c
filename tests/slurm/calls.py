"""Which of SLURM's commands a process calls: a folder for the front of its PATH counts them."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "scancel", "sinfo")


def counted(folder: Path) -> Path:
    """Make a folder whose commands write down their names before they do as ever."""
    folder.mkdir()
    for name in COMMANDS:
        script = folder / name
        real = shutil.which(name)
        assert real, name
        script.write_text(f'#!/bin/bash\necho {name} >> "{folder}/calls"\nexec {real} "$@"\n')
        script.chmod(0o755)
    return folder


def calls(folder: Path) -> Counter[str]:
    """Calls so far, by command."""
    path = folder / "calls"
    return Counter(path.read_text().split()) if path.exists() else Counter()
