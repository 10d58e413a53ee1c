"""Zero-shot scores of a model whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.train.conftest import PAINTS, picture
from train.evaluate import zero_shot

NAMES = sorted(PAINTS)


class _ByColour(nn.Module):
    """A picture's feature is its mean colour, a text's the paint that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, image: Tensor) -> Tensor:
        return F.normalize(image.float().mean((2, 3)) - 100, dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(tokens.float() - 100, dim=-1)


class _Paints:
    def batch(self, texts: Sequence[str]) -> Tensor:
        words = [text.replace(".", "").split() for text in texts]
        return torch.tensor([PAINTS[next(w for w in row if w in PAINTS)] for row in words])


def _write(
    path: Path, rows: list[tuple[bytes, int]], classes: Sequence[str], templates: Sequence[str]
) -> Path:
    table = pa.table(
        {"image": [image for image, _ in rows], "label": pa.array([n for _, n in rows], pa.int32())}
    )
    metadata = {"classes": json.dumps(classes), "templates": json.dumps(templates)}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def _scores(dataset: zero_shot.Dataset, batch: int = 4) -> zero_shot.Scores:
    net, tokenizer = _ByColour(), _Paints()
    classifier = zero_shot.class_features(
        net,  # type: ignore[arg-type]
        tokenizer,  # type: ignore[arg-type]
        dataset.classes,
        dataset.templates,
    )
    assert classifier.shape == (len(dataset.classes), 3)
    assert torch.allclose(classifier.norm(dim=1), torch.ones(len(dataset.classes)))
    *_, last = zero_shot.scores(
        net,  # type: ignore[arg-type]
        dataset,
        classifier,
        side=16,
        short_side=20,
        batch=batch,
    )
    return last


def test_right_wrong_and_undecodable_pictures(tmp_path: Path) -> None:
    rows = [(picture(seed)[0], seed % 3) for seed in range(9)]
    rows[0] = (rows[0][0], 1)  # a wrong label is an error of the model
    rows[4] = (b"no picture", 1)
    path = _write(tmp_path / "set.parquet", rows, NAMES, ["a {} picture.", "{}"])
    for batch in (1, 4, 100):
        results = _scores(zero_shot.open_dataset("set", [path]), batch).results()
        assert results["top1"] == pytest.approx(7 / 9, abs=1e-6)
        assert results["top5"] == pytest.approx(8 / 9, abs=1e-6)  # three classes: all but one
        assert results["classes"] == 3
        assert results["images"] == 9
        assert results["undecodable"] == 1
        assert results["per_class"] == {"blue": 1.0, "green": 0.5, "red": 1.0}
        assert results["mean_per_class"] == pytest.approx(2.5 / 3, abs=1e-6)


def test_classes_without_pictures_compete_but_do_not_count(tmp_path: Path) -> None:
    rows = [(picture(0)[0], 0), (picture(3)[0], 0)]
    path = _write(tmp_path / "set.parquet", rows, NAMES, ["{}"])
    results = _scores(zero_shot.open_dataset("set", [path])).results()
    assert results["per_class"] == {"blue": 1.0}
    assert results["mean_per_class"] == 1.0


def test_templates_are_averaged() -> None:
    class Words:
        def batch(self, texts: Sequence[str]) -> Tensor:
            return torch.tensor([[len(text) + 100, 101, 100] for text in texts])

    net = _ByColour()
    classifier = zero_shot.class_features(net, Words(), ["red"], ["{}", "a very long {}"])  # type: ignore[arg-type]
    parts = F.normalize(torch.tensor([[3.0, 1, 0], [15.0, 1, 0]]), dim=-1)
    torch.testing.assert_close(classifier, F.normalize(parts.sum(0, keepdim=True), dim=-1))


def test_several_files_are_one_dataset(tmp_path: Path) -> None:
    rows = [(picture(seed)[0], seed % 3) for seed in range(6)]
    one = _write(tmp_path / "a.parquet", rows[:4], NAMES, ["{}"])
    two = _write(tmp_path / "b.parquet", rows[4:], NAMES, ["{}"])
    results = _scores(zero_shot.open_dataset("set", [one, two])).results()
    assert results["images"] == 6
    assert results["top1"] == 1.0


def test_datasets_that_cannot_be_used(tmp_path: Path) -> None:
    rows = [(picture(0)[0], 3)]
    path = _write(tmp_path / "set.parquet", rows, NAMES, ["{}"])
    with pytest.raises(zero_shot.EvaluationError, match="label 3, but there are 3 classes"):
        _scores(zero_shot.open_dataset("set", [path]))
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"image": [b""], "label": [0]}), plain)
    with pytest.raises(zero_shot.EvaluationError, match="'classes'"):
        zero_shot.open_dataset("set", [plain])
    pq.write_table(pa.table({"image": [b""]}), plain)
    with pytest.raises(zero_shot.EvaluationError, match="no column 'label'"):
        zero_shot.open_dataset("set", [plain])
    empty = _write(tmp_path / "empty.parquet", [], NAMES, ["{}"])
    with pytest.raises(zero_shot.EvaluationError, match="no pictures"):
        zero_shot.open_dataset("set", [empty])


def test_noise_does_not_matter_to_numpy_labels() -> None:
    scores = zero_shot.Scores(
        ("a", "b"), np.array([2, 2]), np.array([1, 2]), np.array([2, 2]), undecodable=0
    )
    assert scores.results()["top1"] == 0.75
