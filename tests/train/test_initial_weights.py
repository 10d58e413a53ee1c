"""Trained weights as the start: at the same resolution, at another, and of another model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from pipeline.config import ConfigError, MissingInput
from pipeline.stage import Attempt
from pipeline.stop import Stopped
from tests.train.conftest import TINY_MODEL, Pack, Stopping
from tests.train.published import publish_pack
from tests.train.ranks import together
from train import initial_weights, loop, stages, towers
from train.distributed import Process
from train.model import CLIP
from train.settings import ModelSettings, TrainSettings
from train.step import TrainStep

VIT = {"tower": "vit", "layers": [1], "width": 32, "head_width": 16, "patch_size": 8}


def _net(**changes: Any) -> CLIP:
    return CLIP(towers.description(ModelSettings.model_validate({**TINY_MODEL, **changes})))


def _save(net: CLIP, path: Path) -> None:
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, path)


@pytest.mark.parametrize("tower", [{}, VIT])
def test_a_larger_picture_keeps_the_weights(tmp_path: Path, tower: dict[str, Any]) -> None:
    small = _net(**tower)
    _save(small, tmp_path / "small.safetensors")
    large = _net(**tower, image_size=96)
    initial_weights.load(tmp_path / "small.safetensors", large)
    old, new = small.state_dict(), large.state_dict()
    (grid,) = [n for n in old if n.startswith("visual") and n.endswith("positional_embedding")]
    for name in old.keys() - {grid}:
        assert torch.equal(new[name], old[name]), name
    assert len(new[grid]) > len(old[grid])
    assert torch.equal(new[grid][0], old[grid][0])


def test_the_grid_is_resized_as_open_clip_does(tmp_path: Path) -> None:
    small, large = _net(**VIT), _net(**VIT, image_size=96)
    _save(small, tmp_path / "small.safetensors")
    initial_weights.load(tmp_path / "small.safetensors", large)
    theirs = {k: v.clone() for k, v in small.state_dict().items()}
    model = towers.description(ModelSettings.model_validate({**TINY_MODEL, **VIT}))
    model["vision_cfg"]["image_size"] = 96
    model.pop("custom_text")
    resize_pos_embed(theirs, open_clip.CustomTextCLIP(**model))
    name = "visual.positional_embedding"
    torch.testing.assert_close(large.state_dict()[name], theirs[name])


def test_another_model_is_refused(tmp_path: Path) -> None:
    _save(_net(text_width=32), tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"tensors \d+ differ, the first is text\."):
        initial_weights.load(tmp_path / "other.safetensors", _net())
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="no safetensors can be read"):
        initial_weights.load(tmp_path / "other.safetensors", _net())


def _load_sharded(rank: int, world: int, folder: Path) -> None:
    changes = {"model": {**TINY_MODEL, **VIT, "image_size": 96}, "parallel": "fsdp"}
    changes |= {"batch": 8, "samples": 8, "threads": 1, "data": {"lanes": 8}}
    settings = TrainSettings.model_validate(changes)
    described = towers.description(settings.model)
    step = TrainStep(settings, 1, described, Process(rank, world, torch.device("cpu")))
    sharded = [p for p in step.net.parameters() if isinstance(p, DTensor)]
    assert sharded
    initial_weights.load(folder / "small.safetensors", step.net)
    net = step.whole_net()
    if rank == 0:
        _save(net, folder / "whole.safetensors")


def test_a_sharded_model_gets_its_parts(tmp_path: Path) -> None:
    small, large = _net(**VIT), _net(**VIT, image_size=96)
    _save(small, tmp_path / "small.safetensors")
    together(tmp_path, 2, _load_sharded)
    initial_weights.load(tmp_path / "small.safetensors", large)
    whole = load_file(tmp_path / "whole.safetensors")
    expected = large.state_dict()
    assert whole.keys() == expected.keys()
    for name, value in whole.items():
        assert torch.equal(value, expected[name]), name


def test_training_goes_on_from_them_and_not_again_after_a_stop(
    pack: Pack, attempt: Callable[..., Attempt], tmp_path: Path
) -> None:
    packed = pack(20)
    start = _net()
    _save(start, tmp_path / "start.safetensors")
    given: dict[str, Any] = {"init_from": str(tmp_path / "start.safetensors"), "lr": 1e-9}
    whole = attempt(packed, run="undisturbed", **given)
    loop.train(whole)
    trained = load_file(whole.folder / "model.safetensors")
    name = "text.token_embedding.weight"
    torch.testing.assert_close(trained[name], start.state_dict()[name], atol=1e-6, rtol=0)
    with pytest.raises(Stopped):
        loop.train(attempt(packed, stop=Stopping(6), **given))
    last = attempt(packed, **given)
    loop.train(last)
    assert (last.folder / "model.safetensors").read_bytes() == (
        whole.folder / "model.safetensors"
    ).read_bytes()


def test_other_weights_are_another_task(
    pack: Pack, attempt: Callable[..., Attempt], tmp_path: Path
) -> None:
    path = tmp_path / "start.safetensors"
    run = attempt(pack(8), init_from=str(path)).run
    publish_pack(run, tmp_path / "packed")
    with pytest.raises(MissingInput, match=r"start\.safetensors: no such input"):
        stages.TRAIN.planned(run, 0, 0)
    fingerprints = set()
    for content in ("one", "two"):
        path.write_text(content)
        fingerprints.add(stages.TRAIN.planned(run, 0, 0)[0].fingerprint)
    assert len(fingerprints) == 2
