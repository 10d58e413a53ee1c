"""Files that survive crashes: fsync, checksums, and publication that happens once or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.config import UserError

_CHUNK = 1 << 20
_REMOVALS = 100  # as often may another process write into a folder while it is removed
_WHOLE = 64 << 20  # an input up to 64 MiB is identified by all of its bytes


class NoRoom(UserError):
    """The disk of a run is full, or what its user may have of it."""

    exit_code = 6


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that there is no room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


def no_room(folder: Path) -> NoRoom:
    """What to tell whose disk of `folder` is full."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    disk = os.statvfs(there)
    free = f"{disk.f_bavail * disk.f_frsize / 1e6:,.0f} MB and {disk.f_favail:,} files are free"
    return NoRoom(f"no room in {folder}: {free}, unless a quota says less; make room, then the same"
                  " command goes on")  # fmt: skip


def attempt_name() -> str:
    """A name that no other attempt on any host ever has: host, process, random."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def shown(path: Path) -> str:
    """A path as one would type it here: relative where it is below the working folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def distinct(references: Iterable[str], *, links: bool = False) -> list[str]:
    """Each file once, by the first of its names: `a` and `./a` are one. A link is another, unless
    `links` are followed.

    What is no path, an address or a stage's output, is known by itself.
    """
    found: dict[str, str] = {}
    here = Path.cwd()
    for reference in references:
        key = reference
        if ":" not in reference.partition("/")[0]:
            key = str(Path(key).resolve()) if links else os.path.normpath(here / key)
        found.setdefault(key, reference)
    return list(found.values())


def open_parquet(source: Any, *, dictionaries: Sequence[str] = ()) -> Any:
    """A `pyarrow.parquet.ParquetFile` of a path or a stream, to be read piece by piece; the columns
    of `dictionaries` as they are stored, each value once.

    pyarrow reads ahead by default, and holds what it has passed until the file is closed: as much
    memory as the file has bytes.
    """
    import pyarrow.parquet as pq

    return pq.ParquetFile(source, pre_buffer=False, read_dictionary=list(dictionaries))


def fsync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def reread_sha256(path: Path) -> str:
    """Digest of what the disk holds: the cached pages are dropped first where the system allows."""
    fsync(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return sha256(path)


def identity(path: Path) -> str:
    """A cheap name for an input's content: size, and the digest of all (≤ 64 MiB) or both ends.

    Archives of a terabyte cannot be hashed before every run; this tells files apart, it does not
    prove them undamaged.
    """
    size = path.stat().st_size
    if size <= _WHOLE:
        return f"{size}:{sha256(path)}"
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        digest.update(stream.read(_CHUNK))
        stream.seek(size - _CHUNK)
        digest.update(stream.read(_CHUNK))
    return f"{size}:ends:{digest.hexdigest()}"


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` by `data`; a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _write_temporary(path, data)
    temporary.replace(path)
    fsync(path.parent)


def publish_once(path: Path, data: str | bytes) -> bool:
    """Create `path` with `data`, unless it exists already; True if this call created it.

    One `link()` decides, so among any number of callers on a shared disk exactly one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)
    return True


def link_in_place(source: Path, target: Path) -> None:
    """Make `target` another name of `source` (same disk), replacing what was there."""
    if target.exists() and target.samefile(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{attempt_name()}")
    os.link(source, temporary)
    try:
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)  # rename() of two names of one file leaves both


def walk(folder: Path) -> Iterator[Path]:
    """All regular files below `folder`, in sorted order."""
    yield from sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def remove_tree(folder: Path) -> int:
    """Remove a folder which another process may be removing, or still writing into, as well.

    Returns the bytes of its files.
    """
    size = 0
    for parent, _, names in os.walk(folder):  # ignores what goes while it looks
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(parent, name).lstat().st_size

    def go_on(_: object, path: str, error: BaseException) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for _ in range(_REMOVALS):
        try:
            shutil.rmtree(folder, onerror=lambda call, path, info: go_on(call, path, info[1]))
            return size
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
    raise OSError(errno.ENOTEMPTY, "another process keeps writing into it", str(folder))


def _write_temporary(path: Path, data: str | bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{attempt_name()}")
    payload = data.encode() if isinstance(data, str) else data
    try:
        with temporary.open("xb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        if temporary.read_bytes() != payload:
            raise OSError(f"{temporary}: the disk returned other bytes than were written")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
