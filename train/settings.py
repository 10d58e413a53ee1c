"""What can be set about the model, its training and its evaluation. Defaults: CLIP's ViT-B/32.

The paper's hyper-parameters are those of Radford et al., "Learning Transferable Visual Models From
Natural Language Supervision", tables 18 to 20; `presets` holds them for every model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config import Settings, fault
from train import presets


class ModelSettings(Settings):
    """The two towers: an open_clip configuration by its name, or one described field by field."""

    name: str = "ViT-B-32"
    """An open_clip model configuration, such as RN50 or ViT-B-16; `custom`: the fields below."""
    tower: Literal["resnet", "vit"] = "resnet"
    """Image tower: CLIP's modified ResNet with attention pooling, or a vision transformer."""
    image_size: int = Field(default=64, ge=16)
    """Side of the square picture that the model sees, pixels; a multiple of 32 for a ResNet."""
    layers: list[int] = Field(default=[1, 1, 1, 1], min_length=1, max_length=4)
    """Blocks in each of a ResNet's four stages, or the one number of a transformer's blocks."""
    width: int = Field(default=32, ge=8)
    """Channels after a ResNet's stem, or width of the vision transformer."""
    residual_gain: float = Field(default=0.0, ge=0, le=1)
    """At the start, the gain of the last normalisation in every block of a ResNet. With CLIP's 0 a
    deep network begins as a shallow one; a shallow one sees shapes only once its gains have grown,
    and learns several times sooner from 1."""
    head_width: int = Field(default=64, ge=8)
    """Channels of one attention head in the image tower."""
    patch_size: int = Field(default=8, ge=2)
    """Side of a vision transformer's patch, pixels."""
    embed_width: int = Field(default=128, ge=8)
    """Dimensions of the space in which pictures and texts meet."""
    text_width: int = Field(default=128, ge=8)
    """Width of the text transformer."""
    text_layers: int = Field(default=2, ge=1)
    """Blocks of the text transformer."""
    text_heads: int = Field(default=2, ge=1)
    """Attention heads of the text transformer; they divide its width."""
    context_length: int = Field(default=24, ge=4, le=512)
    """Tokens a text is cut to, start and end included."""
    init_temperature: float | None = Field(default=None, gt=0.01)
    """Temperature at the start; it is learned. Unset: 0.07 for the contrastive loss, under which it
    never falls below 0.01, and 0.1 for SigLIP's."""


FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]


class DatasetSettings(Settings):
    """One dataset to train on."""

    operational: ClassVar[frozenset[str]] = frozenset({"path"})  # the index names the content

    path: str
    """A folder of tars in WebDataset's format, a pattern such as /data/cc12m/{00000..01242}.tar or
    s3://bucket/*.tar, or a packed dataset: a run's pack/out."""
    weight: float | None = Field(default=None, gt=0)
    """Part of every batch, in proportion to the weights of the other datasets; if none has one, in
    proportion to their samples."""
    caption: str = Field(default="txt", pattern=r"^(txt|json:.+)$")
    """Where a sample's text is: `txt`, its text file, or `json:caption`, that field of its JSON.
    Packed datasets have text files."""


class DataSettings(Settings):
    """Which datasets, and how samples are ordered, read and decoded."""

    operational: ClassVar[frozenset[str]] = frozenset(
        {"workers", "worker_timeout_s", "prefetch", "cache_bytes", "max_lost", "read_timeout_s"}
    )

    datasets: dict[FileName, DatasetSettings] = Field(default_factory=dict)
    """Name of each dataset to train on -> where it is; empty: what this run's `pack` made."""
    checksums: bool = False
    """Whether the first look at tars without an index reads every picture, so that training can
    tell pictures that were damaged since; otherwise it reads headers and texts. Packed datasets
    have checksums."""
    max_broken_shards: int = Field(default=0, ge=0)
    """Tars that may be left out because they are cut short or otherwise broken; one more ends the
    run."""
    read_timeout_s: float = Field(default=60.0, gt=0)
    """Time for one read from a shard, failed tries included; what takes longer ends the run."""
    lanes: int = Field(default=256, ge=1)
    """Parallel streams that make up a batch. Their number divides the batch, and the number of
    processes divides it; every such number of processes then sees the same global batches."""
    block_samples: int = Field(default=256, ge=1)
    """Consecutive samples of a shard that are read at once and shuffled among themselves."""
    margin: int = Field(default=0, ge=0)
    """Pixels by which a picture's shorter side is made larger than the square that is cropped."""
    workers: int = Field(default=2, ge=0)
    """Processes that decode and tokenise for one training process; 0: it does so itself, while it
    waits. Each takes some 60 MB, and its share of `block_samples` encoded pairs a lane. As many
    scan tars which have no index."""
    worker_timeout_s: float = Field(default=300, gt=0)
    """A worker that was waited for so long is killed and replaced; a part of a batch that fails
    three times ends the run."""
    prefetch: int = Field(default=2, ge=1)
    """Batches made ahead of the step that needs them."""
    cache_bytes: int = Field(default=512 << 20, ge=0)
    """Memory for decoded pictures, which later epochs take from there; 0 keeps none."""
    max_pixels: int = Field(default=1 << 26, ge=1)
    """Pictures with more, width times height, are not decoded: a few bytes can claim terabytes."""
    max_lost: float = Field(default=0.01, ge=0, le=1)
    """Share of all samples that may turn out undecodable; more end the run."""

    def identity(self) -> dict[str, Any]:
        """See `Settings.identity`."""
        datasets = {name: dataset.identity() for name, dataset in self.datasets.items()}
        return {**super().identity(), "datasets": datasets}


class OptimSettings(Settings):
    """AdamW with warm-up and cosine decay; gains, biases and temperature are never decayed."""

    lr: float = Field(default=5e-4, gt=0)
    """Learning rate at the end of the warm-up."""
    warmup_steps: int = Field(default=2000, ge=0)
    """Steps over which the learning rate rises from 0, linearly."""
    weight_decay: float = Field(default=0.2, ge=0)
    """Decoupled decay, per unit of learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    beta2: float = Field(default=0.98, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
    eps: float = Field(default=1e-6, gt=0)
    """Added to the root of that mean."""
    clip_gradients: bool = False
    """Whether gradients are scaled down to `max_grad_norm`."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest norm of all gradients together, where they are clipped."""


class CheckpointSettings(Settings):
    """When the state of training is saved, and how much of it is kept."""

    operational: ClassVar[frozenset[str]] = frozenset(
        {"max_lost_steps", "max_lost_minutes", "keep", "keep_every_steps", "max_failed_saves"}
    )

    max_lost_steps: int = Field(default=1000, ge=2)
    """Steps that a crash may cost at most. A checkpoint is begun twice as often, as it is written
    while training goes on, and training waits for it where it takes longer than that; one more is
    written when training is told to stop."""
    max_lost_minutes: float = Field(default=15.0, gt=0)
    """Minutes of training that a crash may cost at most, likewise."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that stay."""
    keep_every_steps: Annotated[int, Field(ge=1)] | Literal["never"] = "never"
    """Steps between checkpoints that stay for ever, besides the newest ones."""
    max_failed_saves: int = Field(default=3, ge=0)
    """Checkpoints in a row that may fail to be written, on a full disk for one; one more ends the
    run."""


class TrainSettings(OptimSettings):
    """Training of one model on the packed dataset; the optimiser's settings are its own."""

    # A preset's values stand in the other fields, and `init_from` is an input of the task.
    operational: ClassVar[frozenset[str]] = frozenset(
        {"preset", "init_from", "threads", "log_every_steps", "trackers"}
        | {"parallel", "compile", "checkpoint_activations", "processes", "nodes"}
        | {"max_rewinds", "check_replicas_every", "hang_timeout_s"}
    )

    preset: str = "ViT-B/32"
    """The recipe that all keys of this section start from: a model of the CLIP paper (RN50, RN101,
    RN50x4, RN50x16, RN50x64, ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336), `single-gpu` or `cpu`."""
    init_from: str | None = None
    """Weights to start from, a model.safetensors of the same towers; position embeddings are
    resized to another resolution."""
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    """Decides initial weights, the order of samples, and crops."""
    samples: int = Field(default=12_800_000_000, ge=1)
    """Pairs to train on, repetitions counted; rounded up to whole batches."""
    batch: int = Field(default=32_768, ge=2)
    """Pairs that are contrasted with each other, over all processes."""
    model: ModelSettings = ModelSettings()
    """The two towers."""
    data: DataSettings = DataSettings()
    """Order, reading and decoding."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """Saved state."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of the towers; the loss is always float32. `auto`: bfloat16 where the processor
    has matrix units for it."""
    loss: Literal["contrastive", "siglip"] = "contrastive"
    """CLIP's softmax over all pairs of the batch, or SigLIP's sigmoid of each, with a learned bias
    that starts at -10."""
    loss_tile: int = Field(default=1024, ge=1)
    """Rows of the similarity matrix that exist at one time."""
    chunk: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """Pairs that a process sends through the towers at once. Fewer than its part of the batch: the
    towers run twice, features first, and the loss is still that of the whole batch. A ResNet
    normalises by the statistics of a chunk."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Whether each of several processes holds the whole model (ddp) or a part of it (fsdp). `auto`:
    fsdp from 800 million parameters on."""
    compile: Literal["auto"] | bool = "auto"
    """Whether torch.compile makes kernels for the towers; takes minutes at the start. `auto`: on
    GPUs."""
    checkpoint_activations: bool = False
    """Whether the towers' blocks run again on the way back instead of keeping what they computed:
    a third more work, far less memory."""
    sync_batchnorm: bool = False
    """Whether a ResNet normalises by the statistics of all processes' pictures, on GPUs."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """Steps of the last 100 that may be skipped because their loss or gradient was not finite; with
    one more, training goes back."""
    spike_steps: int = Field(default=20, ge=1)
    """Steps running that a loss may stand far above those before; with as many, training goes
    back."""
    rewind: bool = True
    """Whether training then goes back to the last checkpoint before it, and on with the samples
    after it. Without, skipped steps end the run, and high losses are only recorded."""
    max_rewinds: int = Field(default=3, ge=0)
    """How often training goes back before the run ends."""
    check_replicas_every: int = Field(default=100, ge=1)
    """Steps between comparisons of the weights that all processes should have alike; they are also
    compared before every checkpoint."""
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes that train together on this machine. `auto`: one a GPU, one where there is none.
    Another number rounds differently; under torchrun or srun theirs counts."""
    nodes: Annotated[int, Field(ge=1)] | tuple[int, int] = 1
    """On SLURM, how many nodes train together, or the fewest and the most, as [2, 8]: training
    begins on as many as are free and goes on, after a stop, on another number. Of those that it
    gets it uses as many as share `data.lanes` equally, with one process a GPU."""
    hang_timeout_s: float = Field(default=600, ge=1)
    """When no process has moved for so long, all are ended, and another attempt goes on from the
    last checkpoint. The first step, checkpoints and loading may take six times as long."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Where metrics.jsonl is mirrored to: TensorBoard's files in RUN/train/tensorboard, Weights &
    Biases."""
    threads: int | Literal["all"] = "all"
    """Threads that compute, in one process without a GPU; another number rounds differently. `all`:
    the processors, shared among the processes of this machine."""

    @field_validator("nodes")
    @classmethod
    def _fewest_come_first(cls, nodes: int | tuple[int, int]) -> int | tuple[int, int]:
        if not isinstance(nodes, int) and not 1 <= nodes[0] <= nodes[1]:
            raise ValueError("a number of nodes, or [fewest, most]")
        return nodes

    @property
    def fewest_and_most_nodes(self) -> tuple[int, int]:
        """As `nodes` says."""
        return (self.nodes, self.nodes) if isinstance(self.nodes, int) else self.nodes

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given
        name = given.get("preset", cls.model_fields["preset"].default)
        if (known := presets.canonical(str(name))) is None:
            near = " or ".join(presets.nearest(str(name)))
            hint = f"did you mean {near}?" if near else f"there are {', '.join(presets.PRESETS)}"
            raise fault(f"there is no {str(name)!r}; {hint}", "preset")
        start = presets.CONTINUED.get(known)
        if start and not given.get("init_from"):
            raise fault(
                f"{known} goes on from trained weights; set train.init_from to the "
                f"model.safetensors of a {start}",
                "preset",
            )
        return presets.with_preset({**given, "preset": known}, known)

    @model_validator(mode="after")
    def _fits(self) -> TrainSettings:
        if said := self.misfit():
            raise fault(said, "data.lanes", "batch")
        if self.processes != "auto" and (said := self.misfit(self.processes)):
            raise fault(said, "processes", "data.lanes")
        return self

    def misfit(self, processes: int = 1) -> str:
        """Why so many processes cannot share a batch by its lanes, and what would do; else `""`."""
        batch, lanes = self.batch, self.data.lanes
        if batch % lanes:
            said = f"a batch of {batch} cannot be cut into {lanes} equal lanes"
            below = batch // lanes * lanes
            other = f"set train.batch={_either([n for n in (below, below + lanes) if n])}"
        elif lanes % processes:
            said = f"{processes} processes cannot share {lanes} lanes equally"
            other = f"train in {next(n for n in range(processes, 0, -1) if lanes % n == 0)}"
        else:
            return ""
        fitting = [n for n in range(processes, batch + 1, processes) if batch % n == 0]
        near = [n for n in fitting if n < lanes][-1:] + [n for n in fitting if n > lanes][:1]
        first = f"set train.data.lanes={_either(near)}, or " if near else ""
        return f"{said}; {first}{other}"

    def notes(self) -> dict[str, str]:
        """What of these settings follows from the batch, for `python -m pipeline config`."""
        lr, warmup_steps = presets.scaled(self.preset, self.batch, self.samples)
        preset = presets.PRESETS[self.preset]
        notes = {}
        if lr != preset["lr"]:
            rule = f"{preset['lr']:g} x sqrt({self.batch:,} / {preset['batch']:,}) = {lr:g}"
            notes["lr"] = _derived(rule, self.lr == lr, "batch")
        if warmup_steps != preset["warmup_steps"]:
            pairs = preset["warmup_steps"] * preset["batch"]
            rule = f"{pairs:,} pairs, at most a tenth of the run = {warmup_steps:,} steps"
            notes["warmup_steps"] = _derived(
                rule, self.warmup_steps == warmup_steps, "batch and samples"
            )
        return notes


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def _derived(rule: str, holds: bool, source: str) -> str:
    return f"Derived from {source}: {rule}." if holds else f"Given; {source} would make it {rule}."


class EvaluateSettings(Settings):
    """Zero-shot classification with the trained model."""

    operational: ClassVar[frozenset[str]] = frozenset({"batch", "threads"})

    datasets: dict[str, str] = Field(default_factory=dict)
    """Name of each dataset -> its parquet file(s), as `stage:pattern` or a path; columns image and
    label, with class names and prompt templates in the schema's metadata."""
    batch: int = Field(default=256, ge=1)
    """Pictures that go through the image tower together."""
    threads: int | Literal["all"] = "all"
    """Threads that compute where there is no GPU."""
