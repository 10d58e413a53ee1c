"""A trained model in the formats that others read: open_clip's folder, or Hugging Face's.

The folder is complete when it has its name: weights, configuration, preprocessing, tokenizer where
the format has one, and a README.md that says what the model was trained on and what it is worth.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file, save_file

from pipeline import files
from pipeline.config import ConfigError, MissingInput
from pipeline.stage import Run
from train import huggingface, model_card

log = logging.getLogger(__name__)

Format = Literal["open_clip", "huggingface"]


def export(run: Run, format: Format, to: Path) -> Path:
    """Write the model that a run has trained into the new folder `to`; returns that folder.

    Raises `MissingInput` if nothing is trained, `ConfigError` if `to` is in use, and
    `huggingface.NotExportable`.
    """
    trained = trained_model(run)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"TO={to} (--to): is there already; name a new folder")
    saved = json.loads((trained / "model.json").read_text())
    model, preprocess = saved["model_cfg"], saved["preprocess_cfg"]
    weights = load_file(trained / "model.safetensors")
    if format == "huggingface":
        texts, tensors = huggingface.files(model, preprocess, weights)
        name = "model.safetensors"
    else:
        texts, tensors = {"open_clip_config.json": _open_clip_config(model, preprocess)}, weights
        name = "open_clip_model.safetensors"
    texts["README.md"] = model_card.text(run, saved, tensors, format)
    temporary = to.with_name(f".{to.name}.{files.attempt_name()}")
    temporary.mkdir(parents=True)
    try:
        for file, text in texts.items():
            (temporary / file).write_text(text, encoding="utf-8")
        save_file(tensors, temporary / name, metadata={"format": "pt"})
        readable = (temporary / "README.md").stat().st_mode  # safetensors lets only the owner read
        for path in files.walk(temporary):
            path.chmod(readable)
            files.fsync(path)
        if to.exists():
            to.rmdir()
        temporary.rename(to)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    files.fsync(to.parent)
    if format == "open_clip" and preprocess["resize"] != preprocess["size"]:
        log.warning(
            "open_clip resizes to %d where this model was trained with %d; %s has the line that "
            "sets it right",
            *(preprocess["size"], preprocess["resize"], to / "README.md"),
        )
    return to


def trained_model(run: Run) -> Path:
    """The folder with the model.json and model.safetensors of the run's last finished training."""
    trained = run.manifests("train")
    if not trained and (trained := run.completed("train")):
        log.warning("the dataset or the settings have changed since this model was trained; "
                    "`make train RUN=%s` brings it up to date", run.folder)  # fmt: skip
    for manifest in trained:
        return run.stage_folder("train") / "store" / manifest.store
    raise MissingInput(f"{run.folder}: no model is trained here; run `make train RUN={run.folder}`")


def _open_clip_config(model: dict[str, object], preprocess: dict[str, object]) -> str:
    """What `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads."""
    config = {
        "model_cfg": model,
        "preprocess_cfg": {
            "size": preprocess["size"],
            "mean": preprocess["mean"],
            "std": preprocess["std"],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
