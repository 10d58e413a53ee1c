"""Checkpoints on disk: whole or not there, found newest first, kept by rule.

A checkpoint is a folder `step-NNNNNNNNNN`. Its files are written into a folder of another name and
forced to the disk; `state.json`, written last, lists their checksums and carries its own; one
rename makes it a checkpoint, another one unmakes it. Names with a leading dot count for nothing.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline import files
from pipeline.manifest import digest as digest_of

log = logging.getLogger(__name__)

MARKER = "state.json"
_FORMAT = "openwit-checkpoint-2"
_VISIBLE_WITHIN_S = 60.0


@dataclass(frozen=True)
class Progress:
    """Where training is. All else that decides its future is in the weights and the optimiser."""

    step: int = 0
    """Steps done, skipped ones included; the next step to do."""
    skipped: int = 0
    """Steps whose update was left out, their loss or gradient not being finite."""
    substituted: int = 0
    """Samples that stood in for one that could not be decoded."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What `guard.Memory` remembers, as JSON."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself."""

    digest: str
    """Names the configuration and data that it belongs to."""
    progress: Progress
    world: int
    """Processes that wrote it."""
    sha256: Mapping[str, str]
    """By name of the file."""

    def to_json(self) -> str:
        """The text of `state.json`."""
        content = {"format": _FORMAT, **asdict(self)}
        return _dump({**content, "self": digest_of(content)})

    @classmethod
    def from_json(cls, text: str) -> Checkpoint:
        """Raises `ValueError` unless the text is, to the byte, what `to_json` gave."""
        content: Any = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError("not a checkpoint of this program's version")
        if _dump(content) != text or content.pop("self", "") != digest_of(content):
            raise ValueError(f"{MARKER} is damaged")
        try:
            progress = Progress(**content["progress"])
            return cls(content["digest"], progress, content["world"], content["sha256"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a checkpoint of this program's version: {error}") from None


class CheckpointFolder:
    """The checkpoints of one run; one process at a time may change them."""

    def __init__(self, path: Path, *, keep: int, keep_every_steps: int | Literal["never"]) -> None:
        self.path = path
        self._keep = keep
        self._milestones = keep_every_steps

    def publish(self, temporary: Path, checkpoint: Checkpoint) -> Path:
        """Make a folder whose files are on the disk a checkpoint, and delete old ones."""
        self._await(temporary / name for name in checkpoint.sha256)
        files.write_atomic(temporary / MARKER, checkpoint.to_json())
        files.fsync(temporary)
        step = checkpoint.progress.step
        final = self.path / _name(step)
        if final.exists():  # of a course of training that was given up
            self._delete(final)
        temporary.rename(final)
        files.fsync(self.path)
        self.prune(step)
        return final

    def prune(self, step: int) -> None:
        """Delete what has had its day of the checkpoints up to a step's, which is sound."""
        older = [(path, other) for path, other in listed(self.path) if other <= step]
        for path, other in older[self._keep :]:
            if self._milestones != "never" and other % self._milestones == 0:
                continue
            try:
                self._delete(path)
            except OSError as error:
                log.warning("%s cannot be deleted (%s)", path, error.strerror)

    def find(
        self, digest: str, *also: Path, before: int | None = None
    ) -> list[tuple[Path, Checkpoint | str]]:
        """Checkpoints of a configuration, newest first, each with what it says or its fault.

        If `before` is given, those of that step or earlier come first, then the others, oldest
        first.
        Contents are not verified. What a killed process left half-written is deleted. Checkpoints
        of other configurations may be days of work: they are moved out of the way, with `also`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        found: list[tuple[Path, Checkpoint | str]] = []
        aside: Path | None = None
        candidates = listed(self.path)
        if before is not None:
            candidates.sort(key=lambda pair: (pair[1] > before, abs(pair[1] - before)))
        for path, step in candidates:
            said = read(path, step)
            if isinstance(said, str) or said.digest == digest:
                found.append((path, said))
                continue
            aside = self.path / f"set-aside-{said.digest[:12]}"
            _move(path, aside)
        if aside is not None:
            for path in also:
                if path.exists():
                    path.replace(aside / path.name)
            log.info("checkpoints of another configuration or dataset are now in %s", aside)
        return found

    def give_up_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: training went back to before them."""
        for path, other in listed(self.path):
            if other > step:
                self._delete(path)

    def forget(self, temporary: Path) -> None:
        """Delete what was written of a checkpoint that will not be."""
        shutil.rmtree(temporary, ignore_errors=True)

    def put_by(self, damaged: Iterable[Path]) -> None:
        """Move damaged checkpoints where they are neither found nor counted."""
        for path in damaged:
            _move(path, self.path / "damaged")

    def _await(self, paths: Iterable[Path]) -> None:
        """Return when files of other nodes are visible here, which a network disk may delay."""
        until = time.monotonic() + _VISIBLE_WITHIN_S
        for path in paths:
            while not path.is_file():
                if time.monotonic() > until:
                    raise OSError(
                        f"{path} was written by another process and is not visible to this one; "
                        "the run folder must be on a disk that all nodes share"
                    )
                time.sleep(0.1)

    def _delete(self, path: Path) -> None:
        # Renamed first: a checkpoint that is half deleted must not pass for a damaged one.
        doomed = path.with_name(f".{path.name}.{files.attempt_name()}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def listed(folder: Path) -> list[tuple[Path, int]]:
    """The checkpoints in a folder with their steps, newest first; nothing is read."""
    steps = [
        (path, int(number))
        for path in folder.glob("step-*")
        if (number := path.name.removeprefix("step-")).isdecimal()
    ]
    return sorted(steps, key=lambda pair: pair[1], reverse=True)


def read(path: Path, step: int) -> Checkpoint | str:
    """What the checkpoint of a step says of itself, or why that is not known."""
    try:
        said = Checkpoint.from_json((path / MARKER).read_text())
    except OSError as error:
        return f"{MARKER} cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error)
    return said if said.progress.step == step else "its folder was renamed"


def temporary_name(step: int, token: str) -> str:
    """The folder in which a checkpoint is written."""
    return f".{_name(step)}.{token}"


def faults(path: Path, sha256: Mapping[str, str]) -> str | None:
    """What is wrong with the first file that is not what it should be; None if all are."""
    for name, expected in sha256.items():
        try:
            if files.sha256(path / name) != expected:
                return f"{name} is damaged"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1)


def _name(step: int) -> str:
    return f"step-{step:010d}"


def _move(path: Path, into: Path) -> None:
    into.mkdir(exist_ok=True)
    target = into / path.name
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    path.rename(target)
