"""Checkpoints: whole or not there, newest first, of one configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from train import checkpoint
from train.checkpoint import MARKER, Progress


def _trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 4), float(step))).square().sum().backward()
        optimizer.step()
    return model, optimizer


def _save(folder: Path, step: int, *, digest: str = "one", keep: int = 2) -> Path:
    model, optimizer = _trained(step)
    return checkpoint.save(folder, digest, Progress(step, 1, 2), model, optimizer, keep=keep)


def test_what_is_saved_comes_back_and_training_goes_on_alike(tmp_path: Path) -> None:
    _save(tmp_path, 3)
    found = checkpoint.latest(tmp_path, "one")
    assert found is not None
    model, optimizer = _trained(0)
    assert checkpoint.load(found, model, optimizer) == Progress(3, 1, 2)
    optimizer.zero_grad()
    model(torch.full((2, 4), 3.0)).square().sum().backward()
    optimizer.step()
    expected, _ = _trained(4)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):
        _save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-0000000010",
        "step-0000000100",
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", MARKER])
@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "empty"])
def test_a_torn_newest_falls_back(tmp_path: Path, name: str, harm: str) -> None:
    before, newest = _save(tmp_path, 2), _save(tmp_path, 4)
    path = newest / name
    data = bytearray(path.read_bytes())
    if harm == "cut":
        path.write_bytes(data[:-7])
    elif harm == "flip":
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    elif harm == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    assert checkpoint.latest(tmp_path, "one") == before
    # The same step is written again over the damaged one.
    assert checkpoint.latest(tmp_path, "one") != _save(tmp_path, 4)
    assert checkpoint.latest(tmp_path, "one") == newest


def test_an_attempt_that_was_killed_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _save(tmp_path, 2)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("save_file", "files.reread_sha256", "files.write_atomic"):
        with monkeypatch.context() as patch:
            patch.setattr(f"train.checkpoint.{name}", killed)
            with pytest.raises(KeyboardInterrupt):
                _save(tmp_path, 4)
        assert checkpoint.latest(tmp_path, "one") == before
    leftover = tmp_path / ".step-0000000004.host-1-abc"
    leftover.mkdir()
    checkpoint.set_aside(tmp_path, "one")
    assert not leftover.exists()


def test_those_of_another_configuration_are_set_aside(tmp_path: Path) -> None:
    old = _save(tmp_path, 6, digest="other-configuration")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("{}\n")
    assert checkpoint.latest(tmp_path, "one") is None
    aside = checkpoint.set_aside(tmp_path, "one", metrics)
    assert aside == tmp_path / "set-aside-other-config"
    assert not old.exists()
    assert (aside / old.name / MARKER).exists()
    assert (aside / "metrics.jsonl").exists()
    assert not metrics.exists()
    newest = _save(tmp_path, 2)
    assert checkpoint.set_aside(tmp_path, "one", metrics) is None
    assert checkpoint.latest(tmp_path, "one") == newest


def test_the_optimiser_state_needs_no_pickled_code(tmp_path: Path) -> None:
    path = _save(tmp_path, 2)
    assert torch.load(path / "optimizer.pt", weights_only=True)["state"]
    assert json.loads((path / MARKER).read_text())["digest"] == "one"
