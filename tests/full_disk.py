"""A small build on a disk that fails at the first, the second, … at every call that changes a file.

By hand, for the long measurement: `python -m tests.full_disk FOLDER`. It needs a C compiler, `cc`:
calls that libraries make must fail too.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.dataset_build.download.conftest import HostileWeb
from tests.small_build import SmallBuild, digests, ended, faults, fork, load

_SURVIVED, _UNTOUCHED = 3, 4  # exit codes: a build that went well in spite of a fault, or had none
_LIBRARY = "OPENWIT_FAILING_DISK"


def compiled(folder: Path) -> Path:
    """`failing_disk.c` as a library to preload."""
    library = folder / "failing_disk.so"
    source = Path(__file__).with_name("failing_disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def _build(small: SmallBuild, run: Path, nth: int, half: bool) -> None:
    """Build with one fault; in a process of its own."""
    log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    disk = ctypes.CDLL(os.environ[_LIBRARY])
    disk.fail_nth(f"{run}/".encode(), ctypes.c_long(nth), half)
    small.build(run)
    os._exit(_SURVIVED if disk.has_failed() else _UNTOUCHED)


def measure(folder: Path, web: HostileWeb, half: bool, calls: range) -> str:
    """Fail the Nth call for every N of `calls`, as far as a build has so many.

    Raises `AssertionError` if anything that is published is not what was written, a failure is
    silent, or the same command does not give the undisturbed shards afterwards.
    """
    small = SmallBuild(web, addresses=3, tasks=1)
    ready, run = folder / "ready", folder / "run"
    small.build(ready, last=3)
    shutil.copytree(ready, folder / "quiet")
    small.build(folder / "quiet")
    expected = digests(folder / "quiet")
    failed = survived = 0
    for nth in calls:
        shutil.copytree(ready, run)
        code = ended(fork(lambda n=nth: _build(small, run, n, half)))  # type: ignore[misc]
        assert not (found := faults(run)), (nth, found)
        if code in (_SURVIVED, _UNTOUCHED):
            assert digests(run) == expected, f"call {nth} failed, silently"
        if code == _UNTOUCHED:
            shutil.rmtree(run)
            break
        assert code in (1, _SURVIVED), f"call {nth}: {code}, see {run.with_suffix('.log')}"
        failed += code == 1
        survived += code == _SURVIVED
        assert ended(fork(lambda: small.build(run))) == 0
        assert digests(run) == expected, f"call {nth} failed, and the next build differs"
        assert not (found := faults(run)), (nth, found)
        shutil.rmtree(run)
        print(f"call {nth}: {failed} builds failed", file=sys.stderr)
    for name in ("ready", "quiet"):
        shutil.rmtree(folder / name)
    assert failed > survived
    how = "half a write, then a full disk" if half else "a full disk"
    return (
        f"{how} at {failed + survived} of the calls {calls[0]} to {nth}: {failed} builds failed"
        f" loudly, {survived} went well all the same; nothing damaged, the next build whole"
    )


def main() -> int:
    """Print at how many calls a build was made to fail."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--last", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    calls = range(options.first, options.last + 1, options.every)
    if _LIBRARY not in os.environ:
        library = str(compiled(options.folder).absolute())
        os.environ |= {_LIBRARY: library, "LD_PRELOAD": library}
        os.execv(sys.executable, [sys.executable, "-m", "tests.full_disk", *sys.argv[1:]])
    del os.environ["LD_PRELOAD"]
    load()
    web = HostileWeb()
    try:
        for half in (False, True):
            print(measure(options.folder.resolve(), web, half, calls), flush=True)
    finally:
        web.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
