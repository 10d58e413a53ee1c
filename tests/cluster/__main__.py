"""A local cluster for a developer's shell.

eval "$(python -m tests.cluster up --nodes 4)"     # exports SLURM_CONF; then sinfo, sbatch, ...
python -m tests.cluster down                       # ends the cluster that SLURM_CONF names
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.cluster.local_slurm import bring_down, bring_up


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster")
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("settings", nargs="*", metavar="Key=value", help="lines of slurm.conf")
    commands.add_parser("down", help="end the cluster that SLURM_CONF names")
    options = parser.parse_args()
    if options.command == "up":
        settings = dict(setting.split("=", 1) for setting in options.settings)
        print(f"export SLURM_CONF={bring_up(options.nodes, **settings).conf}")
        return 0
    folder = Path(os.environ.get("SLURM_CONF", "")).parent
    if not (folder / "pids" / "keeper").exists():
        print("SLURM_CONF does not name a cluster of `up`", file=sys.stderr)
        return 2
    bring_down(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
