"""What each stage has published so far: one reading of the manifests that a whole report shares."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.manifest import Manifest, Output
from pipeline.stage import Run, Stage
from pipeline.stats import Stats
from pipeline.status import unused

NOT_PART = "is not part of this run"
_PARTICIPLE = {
    "queries": "assembled",
    "extract": "extracted",
    "match": "matched",
    "dedup": "deduplicated",
    "balance": "balanced",
    "download": "downloaded",
    "screen": "screened",
    "pack": "packed",
    "train": "trained",
    "evaluate": "evaluated",
}


@dataclass(frozen=True)
class Published:
    """The manifests of a stage, and where its files are."""

    name: str
    unit: str
    folder: Path
    planned: int
    """Tasks that the runner has planned; 0 if it never came this far."""
    manifests: Sequence[Manifest]
    left_out: Sequence[str] = ()
    """Why tasks failed that the stage did without, one reason each."""

    @cached_property
    def stats(self) -> Stats:
        """The sum over the tasks that are done."""
        return sum((manifest.stats for manifest in self.manifests), Stats())

    @property
    def state(self) -> str:
        """One of `not started`, `n of m tasks`, `done`."""
        if not self.planned:
            return "not started"
        done = len(self.manifests) + len(self.left_out)
        return "done" if done == self.planned else f"{done} of {self.planned} tasks"

    def outputs(self, glob: str) -> Iterator[tuple[Output, Path]]:
        """Published files whose name matches, in order of name, with their place on the disk."""
        found = [
            (output, self.folder / "store" / manifest.store / output.name)
            for manifest in self.manifests
            for output in manifest.outputs
            if fnmatch.fnmatchcase(output.name, glob)
        ]
        yield from sorted(found, key=lambda pair: pair[0].name)

    def paths(self, glob: str) -> list[Path]:
        """As `outputs`, the places alone."""
        return [path for _, path in self.outputs(glob)]


class Absent(Exception):
    """A section of the report cannot be written yet; the message says why."""


class Build(Mapping[str, Published]):
    """The stages of a run by name; one that it has no use for raises `Absent`."""

    def __init__(self, run: Run, stages: Sequence[Stage]) -> None:
        self.run = run
        planned = [len(run.plan(stage.name)) for stage in stages]
        first = unused(planned)
        self._stages = {
            stage.name: Published(
                stage.name,
                stage.unit,
                run.stage_folder(stage.name),
                tasks,
                run.manifests(stage.name),
                list(run.left_out(stage.name).values()) if stage.can_lose_tasks else (),
            )
            for stage, tasks in zip(stages[first:], planned[first:], strict=True)
        }

    def __getitem__(self, name: str) -> Published:
        if name not in self._stages:
            raise Absent(f"the stage {name!r} {NOT_PART}")
        return self._stages[name]

    def __contains__(self, name: object) -> bool:
        return name in self._stages

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)

    def paths(self, stage: str, glob: str) -> list[Path]:
        """Files of a stage; none if it is not part of the run."""
        return self[stage].paths(glob) if stage in self else []

    def need(self, stage: str, glob: str) -> list[Path]:
        """Files of a stage; raises `Absent` with the stage's state if there is none."""
        if found := self[stage].paths(glob):
            return found
        state = self[stage].state
        raise Absent(f"not {_PARTICIPLE.get(stage, 'made')} yet ({stage}: {state}, no {glob})")
