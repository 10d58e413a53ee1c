"""What a training will cost: its arithmetic, counted from the model, over what GPUs deliver."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.plan import Cost, Ledger
from pipeline.rates import Figure
from pipeline.stage import Run
from train.settings import TrainSettings

# GPU-hours that open_clip's PRETRAINED.md gives for 12.8 billion samples of LAION-400M, on A100s.
_PUBLISHED = {"ViT-B-32": 4600, "ViT-B-16": 10_700, "ViT-L-14": 50_800}
_PUBLISHED_SAMPLES = 12_800_000_000
_BYTES_PER_PARAMETER = 12  # weights and AdamW's two moments, float32


def figures(run: Run, name: str) -> dict[str, Figure]:
    """What a run's training did a second: {} where it has none that ended."""
    done = run.manifests("train")
    if not done or not done[0].stats.rows_in:
        return {}
    from train import flops, towers

    each = flops.training_flops(towers.description(run.settings("train").model))
    device, processes = _device(run)
    rate = done[0].stats.rows_in * each / done[0].seconds / processes
    source = f"measured in {name}, on {device}"
    return {"train.flops_per_s": Figure(rate, source)}


def plan(
    run: Run,
    ledger: Ledger,
    *,
    pairs: float | None,
    pair_bytes: float,
    gpu: str | None = None,
    gpus: int = 1,
    mfu: float | None = None,
    samples_per_s: float | None = None,
) -> tuple[Cost, dict[str, float]]:
    """The stage's cost, and what belongs to no column.

    `pairs`: in the dataset, to count its epochs; None where it is not this run's. `samples_per_s`
    and `mfu` are of one GPU. Without a GPU, the time is that of the processor a pilot trained on.
    """
    import torch

    from train import flops, towers
    from train.model import CLIP

    settings: TrainSettings = run.settings("train")
    model = towers.description(settings.model)
    each = flops.training_flops(model)
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in CLIP(model).parameters())
    steps = -(-settings.samples // settings.batch)
    samples = steps * settings.batch
    rate = _flops_per_s(settings, ledger, each, gpu, mfu, samples_per_s)
    device_s = samples * each / rate
    wall = device_s / gpus
    checkpoints = (settings.checkpoint.keep * _BYTES_PER_PARAMETER + 4) * parameters
    facts = {
        "train: samples": float(samples),
        "train: steps": float(steps),
        "train: FLOPs a sample": float(each),
        "train: FLOPs": float(samples * each),
        "train: parameters": float(parameters),
        "train: samples a second": samples / wall,
        "train: read a second, bytes": samples * pair_bytes / wall,
    }
    if pairs:
        facts["train: epochs"] = samples / pairs
    if settings.checkpoint_activations or settings.chunk != "all":
        ledger.note("train: work that is done twice to save memory is not in its FLOPs")
    cost = Cost(
        *("train", "samples", 1, samples, samples),
        core_hours=0.0 if gpu or samples_per_s else device_s / 3600,
        wall_s=wall,
        memory_mb=0.0,
        read_bytes=samples * pair_bytes,
        kept_bytes=float(checkpoints),
        files=6 + 4 * settings.checkpoint.keep,
        busy_s=wall,
        gpu_hours=device_s / 3600 if gpu or samples_per_s else 0.0,
    )
    return cost, facts


def _flops_per_s(
    settings: TrainSettings,
    ledger: Ledger,
    each: int,
    gpu: str | None,
    mfu: float | None,
    samples_per_s: float | None,
) -> float:
    """FLOP/s that one device delivers in training."""
    if samples_per_s is not None:
        return ledger.given("train: samples a second of a GPU", samples_per_s, "given") * each
    if gpu is None:
        if "train.flops_per_s" not in ledger.rates.figures:
            raise ConfigError(
                "plan: say what trains: --gpu H100 --gpus 8, or --from a run that did"
            )
        return ledger.figure("train.flops_per_s")
    from train.hardware import peak_flops

    in_bfloat16 = settings.precision != "float32"
    peak = peak_flops(gpu, bfloat16=in_bfloat16)
    if peak is None:
        raise ConfigError(
            f"--gpu {gpu}: its peak is not known (train/hardware.py lists those that are); "
            "give --samples-per-s of one GPU instead"
        )
    arithmetic = "bfloat16" if in_bfloat16 else "float32"
    ledger.given("train: peak FLOP/s", peak, f"data sheet of {gpu}, {arithmetic}, dense")
    if mfu is None:
        value, source = _published_mfu(settings.model.name)
        mfu = ledger.given("train: MFU", value, source)
    else:
        ledger.given("train: MFU", mfu, "given")
    return peak * mfu


def _published_mfu(name: str) -> tuple[float, str]:
    """The utilisation of the published training that is nearest to a model."""
    from train import flops, hardware, towers
    from train.settings import ModelSettings

    known = name.removesuffix("-quickgelu")
    nearest = known if known in _PUBLISHED else "ViT-B-32"
    each = flops.training_flops(towers.description(ModelSettings(name=nearest)))
    hours = _PUBLISHED[nearest]
    peak = hardware.peak_flops("A100", bfloat16=True)
    assert peak is not None
    value = _PUBLISHED_SAMPLES * each / (hours * 3600) / peak
    return value, (
        f"reference, not measured by us: open_clip's {hours:,} A100 hours for {nearest}; "
        "take `mfu` from the metrics.jsonl of an hour on your GPUs and give --mfu"
    )


def _device(run: Run) -> tuple[str, int]:
    """Where a run trained, and on how many of it."""
    path: Path = run.stage_folder("train") / "training.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return "an unknown device", 1
    return values["device"], values["processes"]
