"""The code as it was when a run was submitted: RUN/code/<hash>, from which its jobs run.

A job may start hours after it was submitted; what is edited meanwhile is not for it.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from pipeline import files

_ROOT = Path(__file__).parent.parent


def take(run_folder: Path, root: Path = _ROOT) -> Path:
    """The snapshot of the project at `root`, made unless it is there already.

    It holds the packages as they are now. What else is in the project, such as inputs, is linked,
    so that paths relative to it mean the same there.
    """
    packages = sorted(path.parent for path in root.glob("*/__init__.py"))
    sources = [path for package in packages for path in _sources(package)]
    digest = hashlib.sha256()
    for path in sources:
        name = path.relative_to(root).as_posix().encode()
        digest.update(b"%d %s %d " % (len(name), name, path.stat().st_size))
        digest.update(path.read_bytes())
    code = run_folder / "code"
    snapshot = code / digest.hexdigest()[:16]
    if not snapshot.exists():
        code.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = code / f".{snapshot.name}.{files.attempt_name()}"
        for path in sources:
            target = temporary / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        try:
            temporary.rename(snapshot)
        except OSError:  # another was quicker, with the same
            shutil.rmtree(temporary)
    for entry in root.iterdir():
        link = snapshot / entry.name
        if entry not in packages and not entry.name.startswith(".") and not link.is_symlink():
            try:
                link.symlink_to(entry.resolve())
            except FileExistsError:
                pass
    return snapshot


def _sources(package: Path) -> list[Path]:
    return [path for path in files.walk(package) if "__pycache__" not in path.parts]
