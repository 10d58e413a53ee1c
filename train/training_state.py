"""The state of training as files of torch.distributed.checkpoint: copied in a step, written later.

Every process copies and writes its share: its shards of sharded tensors, and of what all processes
hold alike, a part. What to write where is agreed upon once, in the step; writing needs no
communication, so it can go on in a thread beside training. Loading takes what this process needs
from all files, whatever the number of processes that wrote them.

Tensors only: hyperparameters are the settings', and the optimiser keeps the ones it was made with.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from pipeline import files
from train.distributed import Process


@dataclass(frozen=True)
class Written:
    """What one process has forced to the disk and read back."""

    sha256: Mapping[str, str]
    """By name of the file."""
    results: list[WriteResult] = field(repr=False)
    """Which tensor is where in them."""
    bytes: int


@dataclass(frozen=True)
class Share:
    """One process's part of a state, in host memory, and where it belongs."""

    plan: SavePlan
    metadata: Metadata | None
    """Of the whole checkpoint; only the leading process has it."""
    data: Mapping[MetadataIndex, Tensor]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in self.data.values())

    def write(self, folder: Path) -> Written:
        """Write this process's files into `folder`; raises what the disk does.

        Nothing is written where there is visibly no room, so that a disk is not filled in vain.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < self.bytes:
            need = f"{self.bytes / 1e6:,.0f} MB to write, {free / 1e6:,.0f} MB free"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {need}", str(folder.parent))
        disk = _HashingFiles()
        results = _writer(folder, disk).write_data(self.plan, _Resolver(self.data)).wait()
        return disk.read_back(folder, results)

    def finish(self, folder: Path, parts: list[Written]) -> Written:
        """Write the index of all processes' files, which makes `folder` readable."""
        assert self.metadata is not None
        disk = _HashingFiles()
        _writer(folder, disk).finish(self.metadata, [part.results for part in parts])
        return disk.read_back(folder, [])


class TrainingState:
    """Weights, buffers and optimiser of a plain, DDP or FSDP2 model."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, process: Process
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._process = process
        self._names: tuple[str, ...] = ()
        self._plan: SavePlan | None = None
        self._metadata: Metadata | None = None
        self._held: dict[MetadataIndex, Tensor] = {}

    def copy(self) -> Share:
        """Copy this process's share into host memory, pinned where there is a GPU.

        The memory is that of the copy before, so one copy may be in use at a time. All processes
        call it together: the first time they agree on who writes what.
        """
        planner = DefaultSavePlanner()
        planner.set_up_planner(self._tensors_to_save(), is_coordinator=self._process.leads)
        names = tuple(planner.state_dict)
        if names != self._names:
            self._agree(planner)
            self._names = names
        assert self._plan is not None
        data: dict[MetadataIndex, Tensor] = {}
        for item in self._plan.items:
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor), f"{item.index.fqn} is not a tensor"
            data[item.index] = self._to_host(item.index, value)
        if self._process.device.type == "cuda":
            torch.cuda.synchronize(self._process.device)
        return Share(self._plan, self._metadata, data)

    def load(self, folder: Path) -> None:
        """Read a checkpoint into model and optimiser, in place; no communication."""
        reader = FileSystemReader(folder)
        metadata = reader.read_metadata()
        saved = set(metadata.state_dict_metadata)
        # Nothing of the optimiser is there if every step until then was skipped.
        stepped = any(name.startswith("optimizer.") for name in saved)
        self._optimizer.zero_grad(set_to_none=True)
        if not stepped:
            self._optimizer.state.clear()
        state = self._tensors(stepped=stepped)
        groups = state.pop("groups")
        planner = DefaultLoadPlanner()
        planner.set_up_planner(state, metadata, self._process.leads)
        assert saved == set(planner.state_dict), saved ^ set(planner.state_dict)
        reader.set_up_storage_reader(metadata, self._process.leads)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        [plan] = reader.prepare_global_plan(planner.create_global_plan([plan]))
        reader.read_data(planner.finish_plan(plan), planner).wait()
        if stepped:
            set_state_dict(
                self._model,
                self._optimizer,
                model_state_dict=state["model"],
                optim_state_dict={"state": state["optimizer"], "param_groups": groups},
            )
        else:
            set_model_state_dict(self._model, state["model"])

    def _tensors(self, *, stepped: bool) -> dict[str, Any]:
        """References to all tensors by name; `groups` are the optimiser's hyperparameters."""
        if not stepped:
            # Asked for its state, an optimiser without one would make a step to have one.
            return {"model": get_model_state_dict(self._model), "groups": []}
        model, optimizer = get_state_dict(self._model, self._optimizer)
        groups = optimizer["param_groups"]
        return {"model": model, "optimizer": optimizer["state"], "groups": groups}

    def _tensors_to_save(self) -> dict[str, Any]:
        state = self._tensors(stepped=bool(self._optimizer.state))
        state.pop("groups")
        if not self._process.leads:
            # Statistics of normalisation differ between processes; those of the leading one count,
            # as they do in training.
            buffers = {b.data_ptr() for b in self._model.buffers() if not isinstance(b, DTensor)}
            state["model"] = {
                name: value
                for name, value in state["model"].items()
                if isinstance(value, DTensor) or value.data_ptr() not in buffers
            }
        return state

    def _agree(self, planner: DefaultSavePlanner) -> None:
        """Cut the state into what each process writes; of equal copies, one is written."""
        process = self._process
        plans: list[Any] = [planner.create_local_plan()]
        if process.world > 1:
            mine = plans[0]
            plans = [None] * process.world
            dist.gather_object(mine, plans if process.leads else None)
        if process.leads:
            plans, self._metadata = planner.create_global_plan(plans)
            writer = _writer(Path(), FileSystem())
            writer.set_up_storage_writer(True)
            plans = writer.prepare_global_plan(plans)
        if process.world > 1:
            received: list[Any] = [None]
            dist.scatter_object_list(received, plans if process.leads else None)
            plans = received
        self._plan = planner.finish_plan(plans[0])
        self._held.clear()

    def _to_host(self, index: MetadataIndex, value: Tensor) -> Tensor:
        if (held := self._held.get(index)) is None:
            held = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._held[index] = held
        held.copy_(value, non_blocking=True)
        return held


class _Hashing:
    """A stream that remembers the digest of what is written through it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return int(self._stream.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _HashingFiles(FileSystem):
    """DCP's file system, which also says what should be in the files that it wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.sha256: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            hashing = _Hashing(stream)
            yield hashing
        self.sha256[Path(path).name] = hashing.digest.hexdigest()

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.sha256[Path(new_path).name] = self.sha256.pop(Path(path).name)

    def read_back(self, folder: Path, results: list[WriteResult]) -> Written:
        """Force all files to the disk and see that it returns what was written."""
        total = 0
        for name, digest in self.sha256.items():
            path = folder / name
            if files.reread_sha256(path) != digest:
                raise OSError(f"{path}: the disk returned other bytes than were written")
            total += path.stat().st_size
        return Written(dict(self.sha256), results, total)


class _Resolver(DefaultSavePlanner):
    """Hands the copies out to the writer."""

    def __init__(self, data: Mapping[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self._data = data

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._data[write_item.index]


def _writer(folder: Path, disk: FileSystem) -> FileSystemWriter:
    # Files are forced to the disk when they are read back; tensors lie in host memory already.
    writer = FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=0)
    writer.fs = disk
    return writer
