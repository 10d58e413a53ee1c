"""The work of the evaluate stage: every dataset of the configuration, one JSON file."""

from __future__ import annotations

import json
import logging

import torch

from pipeline import files
from pipeline.manifest import Stats
from pipeline.stage import Attempt
from train.evaluate import zero_shot
from train.model import Tokenizer, load_model
from train.settings import EvaluateSettings
from train.step import use_threads
from train.towers import context_length

log = logging.getLogger(__name__)


def evaluate(attempt: Attempt) -> Stats:
    """Write `evaluation.json`: dataset -> top1, top5, classes, images and more."""
    settings: EvaluateSettings = attempt.settings
    use_threads(settings.threads)
    datasets = {
        name: zero_shot.open_dataset(name, [attempt.run.path(ref) for ref in references])
        for name, references in attempt.task.params["datasets"].items()
    }
    description, weights = attempt.inputs()[:2]
    net, saved = load_model(description, weights)
    net.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer(context_length(saved["model_cfg"]))
    preprocess = saved["preprocess_cfg"]

    stats = Stats()
    total = sum(dataset.images for dataset in datasets.values())
    results = {}
    for name, dataset in datasets.items():
        log.info("%s: %d pictures of %d classes", name, dataset.images, len(dataset.classes))
        classifier = zero_shot.class_features(net, tokenizer, dataset.classes, dataset.templates)
        counted = None
        for counted in zero_shot.scores(
            net,
            dataset,
            classifier,
            side=preprocess["size"],
            short_side=preprocess["resize"],
            batch=settings.batch,
        ):
            attempt.progress(stats.rows_in + int(counted.images.sum()), total, "images")
            attempt.stop.check()
        assert counted is not None
        results[name] = counted.results()
        stats.rows_in += dataset.images
        stats.rows_out += dataset.images - counted.undecodable
        if counted.undecodable:
            stats.drop("undecodable", counted.undecodable)
        log.info("%s: top-1 %.1f%%", name, 100 * float(counted.first.sum() / dataset.images))

    text = json.dumps(results, indent=1, sort_keys=True) + "\n"
    (attempt.folder / "evaluation.json").write_text(text)
    files.write_atomic(attempt.run.stage_folder("evaluate") / "evaluation.json", text)
    return stats
