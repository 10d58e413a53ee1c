"""What can be set about the model, its training and its evaluation. Defaults: CLIP's ViT-B/32.

The paper's hyper-parameters are those of Radford et al., "Learning Transferable Visual Models From
Natural Language Supervision", tables 18 to 20.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.config import Settings


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
    init_temperature: float = Field(default=0.07, gt=0.01)
    """Temperature of the softmax at the start; it is learned, and never falls below 0.01."""


class DataSettings(Settings):
    """How samples are ordered, read and decoded."""

    operational: ClassVar[frozenset[str]] = frozenset(
        {"workers", "worker_timeout_s", "prefetch", "cache_bytes", "max_lost"}
    )

    lanes: int = Field(default=256, ge=1)
    """Parallel streams that make up a batch. Their number divides the batch, and the number of
    processes divides it; every such number of processes then sees the same global batches."""
    block_samples: int = Field(default=256, ge=1)
    """Consecutive samples of a shard that are read at once and shuffled among themselves."""
    margin: int = Field(default=0, ge=0)
    """Pixels by which a picture's shorter side is made larger than the square that is cropped."""
    workers: int = Field(default=2, ge=0)
    """Processes that decode and tokenise for one training process; 0: it does so itself, while it
    waits. Each takes some 60 MB, and its share of `block_samples` encoded pairs a lane."""
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

    operational: ClassVar[frozenset[str]] = frozenset({"every_steps", "keep"})

    every_steps: int = Field(default=1000, ge=1)
    """Steps between checkpoints; one more is written when training is told to stop."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that stay."""


class TrainSettings(OptimSettings):
    """Training of one model on the packed dataset; the optimiser's settings are its own."""

    operational: ClassVar[frozenset[str]] = frozenset({"threads", "log_every_steps"})

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
    loss_tile: int = Field(default=1024, ge=1)
    """Rows of the similarity matrix that exist at one time."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """Steps that may be skipped because their loss or gradient was not finite; one more ends the
    run."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    threads: int | Literal["all"] = "all"
    """Threads that compute, in one process without a GPU; another number rounds differently."""


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
