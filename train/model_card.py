"""The README.md of an exported model: how to load it, what it was trained on, what it is worth."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from pipeline.config import UserError
from pipeline.manifest import find
from pipeline.stage import Run
from train import stages

_LOAD = {
    "open_clip": """\
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
""",
    "huggingface": """\
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("{folder}")
processor = CLIPProcessor.from_pretrained("{folder}")
""",
}
_LIBRARY = {"open_clip": "open_clip", "huggingface": "transformers"}


def text(run: Run, saved: Mapping[str, Any], weights: Mapping[str, Tensor], format: str) -> str:
    """The card of the model whose model.json is `saved`, in Markdown."""
    return "\n".join(_lines(run, saved, weights, format)) + "\n"


def _lines(
    run: Run, saved: Mapping[str, Any], weights: Mapping[str, Tensor], format: str
) -> Iterator[str]:
    model, preprocess = saved["model_cfg"], saved["preprocess_cfg"]
    yield from ("---", f"library_name: {_LIBRARY[format]}", "tags: [clip]")
    yield from ("pipeline_tag: zero-shot-image-classification", "---", "", "# CLIP", "")
    yield (
        f"Two towers and a temperature, {sum(tensor.numel() for tensor in weights.values()):,} "
        "numbers, trained by OpenWIT to tell which text belongs to which picture."
    )
    yield from ("", "## Use", "", "```python", _LOAD[format].format(folder="FOLDER").rstrip())
    if format == "open_clip" and preprocess["resize"] != preprocess["size"]:
        yield f"preprocess.transforms[0].size = {preprocess['resize']}"
    yield from ("```", "")
    size = preprocess["size"]
    yield (
        f"Pictures: the shorter side resized to {preprocess['resize']} pixels, the {size} x {size} "
        f"square in the middle, normalised. Texts: lower-cased, "
        f"{model['text_cfg'].get('context_length', 77)} tokens at most."
    )
    if format == "huggingface":
        yield (
            "The tokenizer of transformers neither repairs wrongly encoded texts nor resolves HTML "
            "entities, as was done in training."
        )
    yield from ("", "## Accuracy", "", *_accuracy(run))
    yield from ("", "## Training", "", "| | |", "|---|---|")
    yield f"| temperature at the end | {1 / weights['logit_scale'].exp().item():.4f} |"
    if not (training := saved.get("training")):  # of a model that an earlier version trained
        return
    yield f"| dataset fingerprint | `{training['dataset']}` |"
    yield f"| pairs in the dataset | {training['pairs']:,} |"
    yield f"| pairs seen, repetitions counted | {training['seen']:,} |"
    settings = yaml.safe_dump(training["settings"], sort_keys=False, allow_unicode=True).rstrip()
    yield from ("", "Settings that decided the result:", "", "```yaml", settings, "```")


def _accuracy(run: Run) -> Iterator[str]:
    results = _evaluation(run)
    if not results:
        yield "Not evaluated."
        return
    yield "Zero-shot classification, with prompt templates:"
    yield from ("", "| dataset | top-1 | top-5 | classes | pictures |", "|---|---|---|---|---|")
    for name, result in sorted(results.items()):
        yield (
            f"| {name} | {result['top1']:.1%} | {result['top5']:.1%} | {result['classes']:,} "
            f"| {result['images']:,} |"
        )


def _evaluation(run: Run) -> dict[str, dict[str, Any]]:
    """`evaluation.json` of this very model; empty if there is none."""
    try:
        planned = stages.EVALUATE.planned(run, 0, 0)
    except UserError:  # no datasets configured, or one of them is gone
        return {}
    folder = run.stage_folder("evaluate")
    if (manifest := find(folder, planned[0].fingerprint)) is None:
        return {}
    path: Path = folder / "store" / manifest.store / "evaluation.json"
    results: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return results
