"""The work of the evaluate stage: every dataset of the configuration, one JSON file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping

import torch

from pipeline import files
from pipeline.stage import Attempt
from pipeline.stats import Stats
from pipeline.stop import StopFlag
from train.evaluate import zero_shot
from train.model import CLIP, Tokenizer, load_model
from train.settings import EvaluateSettings
from train.step import use_threads

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
    short_side = saved["preprocess_cfg"]["resize"]

    stats = Stats()
    total = sum(dataset.images for dataset in datasets.values())

    def tick(done: int) -> None:
        attempt.progress(done, total, "images")

    results = {}
    for name, scores in measure(net, datasets, settings, short_side, attempt.stop, tick):
        results[name] = scores.results()
        images = datasets[name].images
        stats.rows_in += images
        stats.rows_out += images - scores.undecodable
        if scores.undecodable:
            stats.drop("undecodable", scores.undecodable)

    text = json.dumps(results, indent=1, sort_keys=True) + "\n"
    (attempt.folder / "evaluation.json").write_text(text)
    files.write_atomic(attempt.run.stage_folder("evaluate") / "evaluation.json", text)
    return stats


def measure(
    net: CLIP,
    datasets: Mapping[str, zero_shot.Dataset],
    settings: EvaluateSettings,
    short_side: int,
    stop: StopFlag,
    tick: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[str, zero_shot.Scores]]:
    """Each dataset with the model's scores. `short_side`: of pictures before they are cropped.

    `tick` is told how many pictures are done. Raises `Stopped` between batches if asked to stop.
    """
    tokenizer = Tokenizer(net.context_length)
    before = 0
    for name, dataset in datasets.items():
        log.info("%s: %d pictures of %d classes", name, dataset.images, len(dataset.classes))
        classifier = zero_shot.class_features(net, tokenizer, dataset.classes, dataset.templates)
        counted = None
        for counted in zero_shot.scores(
            net,
            dataset,
            classifier,
            side=net.image_size,
            short_side=short_side,
            batch=settings.batch,
        ):
            tick(before + int(counted.images.sum()))
            stop.check()
        assert counted is not None
        before += dataset.images
        log.info("%s: top-1 %.1f%%", name, 100 * float(counted.first.sum() / dataset.images))
        yield name, counted
