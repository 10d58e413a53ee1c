"""The section `slurm:`: what jobs ask for and how many there are; nothing here changes a result."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from pipeline.config import Settings

DRIVER = "driver"
"""The name, beside those of the stages, of the jobs that submit the next ones."""


class Resources(Settings):
    """What one job asks for. What is left out is the cluster's default."""

    partition: str | None = None
    """The partition, or several with commas between."""
    account: str | None = None
    """Whom the time is charged to."""
    qos: str | None = None
    """Quality of service."""
    time_minutes: int | None = Field(default=None, gt=0)
    """Time limit, minutes. A job that reaches it saves, is queued again and goes on."""
    cpus: int | None = Field(default=None, gt=0)
    """Cores a process; a job of an array runs as many tasks at the same time."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory a node, GiB; tasks that share a job share it."""
    gpus: int | None = Field(default=None, ge=0)
    """GPUs a node."""
    processes_per_node: int | None = Field(default=None, gt=0)
    """Processes on each node of a stage that spans nodes, where it is not one a GPU."""
    constraint: str | None = None
    """Features that the nodes must have."""
    extra: tuple[str, ...] = ()
    """Further options of sbatch, each as on its command line: `[--exclusive, --exclude=n7]`; one
    may stand alone."""

    @field_validator("extra", mode="before")
    @classmethod
    def _may_be_one(cls, extra: Any) -> Any:
        return (extra,) if isinstance(extra, str) else extra

    @field_validator("extra")
    @classmethod
    def _are_options(cls, extra: tuple[str, ...]) -> tuple[str, ...]:
        for option in extra:
            if not option.startswith("--") or " " in option.partition("=")[0]:
                raise ValueError(f"{option!r}: write options as --name or --name=value")
        return extra


class SlurmSettings(Settings):
    """How tasks run on a SLURM cluster."""

    default: Resources = Field(default_factory=Resources)
    """What every job asks for."""
    stages: dict[str, Resources] = Field(default_factory=dict)
    """What the jobs of a stage ask for, by its name; it stands above `default`, field by field.
    `driver` are the small jobs that submit the next ones."""
    job_minutes: int = Field(default=30, gt=0)
    """How long a job of several tasks should last, minutes."""
    tasks_per_job: Literal["auto"] | int = "auto"
    """Tasks of one job; auto: by `job_minutes` and the time that such tasks took so far."""
    max_array: int = Field(default=1000, gt=0)
    """Jobs of one array at most: MaxArraySize - 1 of the cluster's `scontrol show config`."""
    max_submitted: int = Field(default=1000, gt=0)
    """Jobs in the queue at the same time at most; the rest is submitted when these have ended."""
    attempts: int = Field(default=3, ge=1)
    """Jobs that may try a task before it counts as failed."""
    max_requeues: int = Field(default=20, ge=0)
    """How often one job may be stopped by its time limit, save and go on."""
    setup: tuple[str, ...] = ()
    """Shell lines that a job runs first, such as `module load cuda`."""
    signal_seconds: int = Field(default=120, gt=0)
    """How long before its time limit a job is told to stop at a safe point, seconds."""
    evaluate_minutes: int = Field(default=30, ge=0)
    """How long after one look at the checkpoints of a training that goes on the next one begins,
    minutes. Its jobs ask for what `stages` says of `evaluate`."""
    poll_seconds: float = Field(default=90, gt=0)
    """With WAIT=1, how long between two looks at the queue, seconds. That all tasks of a stage are
    done is seen at once, on disk."""

    operational = frozenset(
        {
            "default",
            "stages",
            "job_minutes",
            "tasks_per_job",
            "max_array",
            "max_submitted",
            "attempts",
            "max_requeues",
            "setup",
            "signal_seconds",
            "evaluate_minutes",
            "poll_seconds",
        }
    )

    @field_validator("setup", mode="before")
    @classmethod
    def _may_be_one(cls, setup: Any) -> Any:
        return (setup,) if isinstance(setup, str) else setup

    @field_validator("tasks_per_job")
    @classmethod
    def _is_positive(cls, tasks: Literal["auto"] | int) -> Literal["auto"] | int:
        if tasks != "auto" and tasks < 1:
            raise ValueError("auto, or a number of tasks, at least 1")
        return tasks

    def key(self, stage: str, field: str) -> str:
        """Where it is said what jobs of a stage ask for: the name of the setting to change."""
        own = self.stages.get(stage)
        where = f"stages.{stage}" if own and field in own.model_fields_set else "default"
        return f"slurm.{where}.{field}"

    def resources(self, stage: str) -> Resources:
        """What jobs of a stage ask for."""
        own = self.stages.get(stage, Resources())
        return self.default.model_copy(update=own.model_dump(exclude_unset=True))
