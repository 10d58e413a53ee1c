"""Saved training states that survive kill -9 at any moment.

A checkpoint is a folder `step-NNNNNNNNNN`. Its files are written into a folder of another name and
forced to the disk; `state.json`, written last, lists their checksums; one rename makes it a
checkpoint. Reading takes the newest one whose checksums hold.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import files

log = logging.getLogger(__name__)

MARKER = "state.json"


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


def save(
    folder: Path,
    digest: str,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    keep: int,
) -> Path:
    """Write the checkpoint of a step and delete all but the `keep` newest ones.

    `digest` names the configuration and data; `latest` finds only checkpoints of the same one.
    """
    final = folder / f"step-{progress.step:010d}"
    temporary = folder / f".{final.name}.{files.attempt_name()}"
    temporary.mkdir(parents=True)
    try:
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, temporary / "model.safetensors")
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        checksums = {path.name: files.reread_sha256(path) for path in files.walk(temporary)}
        state = {"digest": digest, "progress": asdict(progress), "sha256": checksums}
        files.write_atomic(temporary / MARKER, json.dumps(state, indent=1))
        if final.exists():  # damaged, or it would have been resumed
            shutil.rmtree(final)
        temporary.rename(final)
        files.fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list(_newest_first(folder))[keep:]:
        shutil.rmtree(old)
    return final


def latest(folder: Path, digest: str, *, until: int | None = None) -> Path | None:
    """The newest whole checkpoint of this configuration; damaged ones are passed over.

    If `until` is given, the newest of that step or before, or else the one that comes closest.
    """
    paths = list(_newest_first(folder))
    if until is not None:
        paths.sort(key=lambda path: (_step(path) > until, abs(_step(path) - until)))
    for path in paths:
        if (state := _state(path)) is None:
            log.warning("%s is damaged; going on from the checkpoint before it", path)
        elif state["digest"] == digest:
            return path
    return None


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint's state into `model` and `optimizer`, in place."""
    model.load_state_dict(load_file(path / "model.safetensors"))
    state: dict[str, Any] = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state)
    return Progress(**json.loads((path / MARKER).read_text())["progress"])


def set_aside(folder: Path, digest: str, *also: Path) -> Path | None:
    """Move the checkpoints of another configuration, and the files `also`, out of the way.

    They may be days of work, so they are not deleted. Returns where they went, None if there were
    none. What a killed process left half-written is deleted.
    """
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    aside: Path | None = None
    for path in list(_newest_first(folder)):
        state = _state(path, verify=False)
        if state is None or state["digest"] == digest:
            continue
        aside = folder / f"set-aside-{state['digest'][:12]}"
        aside.mkdir(exist_ok=True)
        if (aside / path.name).exists():
            shutil.rmtree(aside / path.name)
        path.rename(aside / path.name)
    if aside is not None:
        for path in also:
            if path.exists():
                path.replace(aside / path.name)
    return aside


def give_up_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps: training went back to before them."""
    for path in list(_newest_first(folder)):
        if _step(path) > step:
            shutil.rmtree(path)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _newest_first(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("step-*"), reverse=True)


def _state(path: Path, *, verify: bool = True) -> Mapping[str, Any] | None:
    """A checkpoint's marker, or None unless it and, if `verify`, every file it lists are whole."""
    try:
        state: Mapping[str, Any] = json.loads((path / MARKER).read_text())
        whole = not verify or all(
            files.sha256(path / name) == checksum for name, checksum in state["sha256"].items()
        )
        return state if whole and isinstance(state["digest"], str) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
