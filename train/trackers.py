"""Mirrors of metrics.jsonl where people compare runs: TensorBoard, Weights & Biases.

A mirror never decides anything: one that fails is switched off with a warning, and training goes
on. What was sent is noted in RUN/train/trackers.json, so that a run that goes on repeats no step.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from pipeline import files
from pipeline.config import ConfigError
from pipeline.stop import shielded

log = logging.getLogger(__name__)

Row = Mapping[str, float | int | None]
"""A row of metrics.jsonl."""

CLOSING_S = 30.0
"""How long a mirror may take to hand over what it still holds."""
_PLACES = {"step", "samples", "epoch", "time"}


class Mirror(Protocol):
    """Takes rows of metrics; may raise anything."""

    def send(self, step: int, row: Row) -> None:
        """Take the figures of a step."""

    def close(self) -> None:
        """Hand over what is held."""


Open = Callable[[Path, str, str, Mapping[str, Any]], Mirror]
"""(RUN/train, the training's digest, an id that stays with it, its settings) -> a mirror."""


class TensorBoard:
    """Event files in RUN/train/tensorboard, a folder for each configuration and dataset."""

    def __init__(self, folder: Path, digest: str, name: str, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard" / digest[:12]))

    def send(self, step: int, row: Row) -> None:
        """See `Mirror`."""
        for name, value in _figures(row).items():
            self._writer.add_scalar(f"train/{name}", value, step, walltime=row.get("time"))
        self._writer.flush()

    def close(self) -> None:
        """See `Mirror`."""
        self._writer.close()


class WeightsAndBiases:
    """One run of Weights & Biases, which later attempts go on with; WANDB_* variables hold.

    Without a network, WANDB_MODE=offline keeps it in RUN/train/wandb for `wandb sync`.
    """

    def __init__(self, folder: Path, digest: str, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        quiet = wandb.Settings(silent=True, console="off", init_timeout=60)
        self._run = wandb.init(
            dir=str(folder),
            id=name,
            resume="allow",
            name=folder.parent.name,
            config=dict(settings),
            settings=quiet,
        )

    def send(self, step: int, row: Row) -> None:
        """See `Mirror`."""
        self._run.log(_figures(row), step=step)

    def close(self) -> None:
        """See `Mirror`."""
        self._run.finish()


MIRRORS: dict[str, tuple[str, Open]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", WeightsAndBiases),
}
"""Name in the configuration -> (the package that it needs, how to open it)."""


def check(names: Sequence[str]) -> None:
    """Raise `ConfigError` if the package of a mirror is missing.

    Every process asks, so that none waits for one that has ended.
    """
    for name in names:
        package, _ = MIRRORS[name]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"train.trackers: {name} needs the package {package}, which is not installed; "
                "pip install -e '.[logging]'"
            )


class Mirrors:
    """All mirrors of one training, each fed every step once, whatever happens between.

    Training that goes back and takes other data than before keeps its first way in them.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, digest: str, settings: Mapping[str, Any]
    ) -> None:
        self._folder = folder
        self._path = folder / "trackers.json"
        self._digest = digest
        self._settings = settings
        self._names = names
        self._open: dict[str, Mirror] = {}
        self._sent: dict[str, int] = {}

    def __enter__(self) -> Mirrors:
        known = _json(self._path)
        if known.get("digest") != self._digest:  # another configuration or dataset: another run
            known = {"digest": self._digest, "id": secrets.token_hex(4), "sent": {}}
        self._id: str = known["id"]
        self._sent = dict(known["sent"])
        if self._names:
            self._note()
        for name in self._names:
            _, opened = MIRRORS[name]
            try:
                with shielded():  # wandb has a process of its own
                    self._open[name] = opened(self._folder, self._digest, self._id, self._settings)
            except Exception as error:
                self._switch_off(name, error)
        return self

    def send(self, row: Row) -> None:
        """Give a row to each mirror that has not had its step."""
        step = int(row["step"] or 0)
        late = [name for name in self._open if step > self._sent.get(name, 0)]
        for name in late:
            try:
                self._open[name].send(step, row)
            except Exception as error:
                self._switch_off(name, error)
            else:
                self._sent[name] = step
        if late:
            self._note()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, mirror in list(self._open.items()):
            if (failure := _within(CLOSING_S, mirror.close)) is not None:
                self._switch_off(name, failure)

    def _note(self) -> None:
        state = {"digest": self._digest, "id": self._id, "sent": self._sent}
        temporary = self._path.with_name(f".{self._path.name}.{files.attempt_name()}")
        temporary.write_text(json.dumps(state))
        temporary.replace(self._path)  # not forced to the disk: at worst a few steps come twice

    def _switch_off(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        log.warning(
            "train.trackers: %s is switched off, training goes on (%s: %s); metrics.jsonl has all",
            *(name, type(error).__name__, error),
        )


def _figures(row: Row) -> dict[str, float]:
    """What of a row is a curve over steps."""
    return {k: v for k, v in row.items() if k not in _PLACES and v is not None}


def _within(seconds: float, call: Callable[[], None]) -> Exception | None:
    """Call, but wait no longer than that: a stop must not hang on somebody's server."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="closing a tracker", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return TimeoutError(f"not closed within {seconds:g} s")
    return raised[0] if raised else None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
