"""Zero-shot classification: the class whose name, in a sentence, lies nearest to the picture.

A class is the mean of the text features of its name in every prompt template (section 3.1.4 of the
CLIP paper).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline import files
from pipeline.config import UserError
from train.data import decode
from train.model import CLIP, Tokenizer


class EvaluationError(UserError):
    """A dataset that cannot be evaluated on."""

    exit_code = 6


@dataclass(frozen=True)
class Dataset:
    """Labelled pictures: parquet files with columns `image` (bytes) and `label`."""

    files: tuple[Path, ...]
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    """Sentences with `{}` where the class's name goes."""
    images: int

    def batches(self, size: int) -> Iterator[tuple[list[bytes], list[int]]]:
        """Pictures, encoded, and their labels, at most `size` at a time."""
        for path in self.files:
            with files.open_parquet(path) as parquet:
                for rows in parquet.iter_batches(size, columns=["image", "label"]):
                    images: list[bytes] = rows["image"].to_pylist()
                    labels: list[int] = rows["label"].to_pylist()
                    yield images, labels


@dataclass
class Scores:
    """Counts over the pictures of a dataset; arrays are [classes]."""

    classes: tuple[str, ...]
    images: NDArray[np.int64]
    first: NDArray[np.int64]
    """Pictures whose class ranked first."""
    fifth: NDArray[np.int64]
    """Pictures whose class is among the first five."""
    undecodable: int = 0
    """Pictures that could not be decoded; each counts as an error."""

    def results(self) -> dict[str, object]:
        """What goes into `evaluation.json`; accuracies are shares of all pictures, 0 to 1."""
        total = int(self.images.sum())
        shown = np.flatnonzero(self.images)
        per_class = self.first[shown] / self.images[shown]
        return {
            "top1": round(float(self.first.sum() / total), 6),
            "top5": round(float(self.fifth.sum() / total), 6),
            "mean_per_class": round(float(per_class.mean()), 6),
            "classes": len(self.classes),
            "images": total,
            "undecodable": self.undecodable,
            "per_class": {
                self.classes[label]: round(float(share), 6)
                for label, share in zip(shown, per_class, strict=True)
            },
        }


def open_dataset(name: str, paths: Sequence[Path]) -> Dataset:
    """Read class names and templates from the first file's schema and check the columns.

    Raises `EvaluationError`.
    """
    images = 0
    for path in paths:
        with files.open_parquet(path) as parquet:
            missing = {"image", "label"} - set(parquet.schema_arrow.names)
            if missing:
                raise EvaluationError(f"{path}: has no column {sorted(missing)[0]!r}")
            images += parquet.metadata.num_rows
    metadata = pq.read_schema(paths[0]).metadata or {}
    try:
        classes = tuple(json.loads(metadata[b"classes"]))
        templates = tuple(json.loads(metadata[b"templates"]))
    except KeyError as key:
        raise EvaluationError(
            f"{paths[0]}: its schema's metadata lacks {key.args[0].decode()!r}, a JSON list"
        ) from None
    if not images or not classes or not templates:
        raise EvaluationError(f"evaluate.datasets.{name}: no pictures, classes or templates")
    return Dataset(tuple(paths), classes, templates, images)


@torch.no_grad()
def class_features(
    net: CLIP, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """One direction a class, float32 [classes, width] of length 1."""
    device = net.logit_scale.device
    total: Tensor | None = None
    for template in templates:
        texts = [template.replace("{}", name) for name in classes]
        parts = [
            net.encode_text(tokenizer.batch(texts[start : start + 256]).to(device))
            for start in range(0, len(texts), 256)
        ]
        features = torch.cat(parts)
        total = features if total is None else total + features
    assert total is not None
    return F.normalize(total, dim=-1)


@torch.no_grad()
def scores(
    net: CLIP, dataset: Dataset, classifier: Tensor, *, side: int, short_side: int, batch: int
) -> Iterator[Scores]:
    """Classify a dataset; yields the counts so far after every batch, the last being complete.

    Pictures are resized to `short_side`, and the `side` x `side` square in their middle is used.
    """
    count = len(dataset.classes)
    zeros = np.zeros((3, count), np.int64)
    totals = Scores(dataset.classes, zeros[0], zeros[1], zeros[2])
    for images, labels in dataset.batches(batch):
        outside = [label for label in labels if not 0 <= label < count]
        if outside:
            raise EvaluationError(
                f"{dataset.files[0]}: label {outside[0]}, but there are {count} classes"
            )
        np.add.at(totals.images, labels, 1)
        pixels, kept = [], []
        for data, label in zip(images, labels, strict=True):
            try:
                pixels.append(decode.central_crop(decode.decode(data, short_side), side))
                kept.append(label)
            except decode.Undecodable:
                totals.undecodable += 1
        if pixels:
            stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
            features = net.encode_image(stacked.to(classifier.device))
            ranked = (features @ classifier.T).topk(min(5, count), dim=1).indices.cpu()
            right = (ranked == torch.tensor(kept)[:, None]).numpy()
            np.add.at(totals.first, kept, right[:, 0])
            np.add.at(totals.fifth, kept, right.any(1))
        yield totals
