"""The model: open_clip's parts, our temperature, files that others can read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import ConfigError
from tests.train.conftest import TINY_MODEL
from train import towers
from train.model import CLIP, Tokenizer, load_model, save_model
from train.settings import ModelSettings

VIT = {"tower": "vit", "layers": [2], "width": 32, "head_width": 16, "patch_size": 8}


def _description(**changes: Any) -> dict[str, Any]:
    return towers.description(ModelSettings.model_validate({**TINY_MODEL, **changes}))


def _inputs(model: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    side = towers.image_size(model)
    image = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    return image, Tokenizer(towers.context_length(model)).batch(["a cat", "a dog", "two dogs"])


@pytest.mark.parametrize("changes", [{}, VIT])
def test_features_have_length_one(changes: dict[str, Any]) -> None:
    model = _description(**changes)
    net = CLIP(model)
    images, texts, scale = net(*_inputs(model))
    for features in (images, texts):
        assert features.shape == (3, 16)
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert scale.item() == pytest.approx(1 / 0.07)


def test_the_multiplier_is_held_at_one_hundred() -> None:
    net = CLIP(_description())
    net.logit_scale.data.fill_(math.log(100) + 1)
    net.clamp_temperature()
    assert net.logit_scale.exp().item() == pytest.approx(100)
    net.logit_scale.data.fill_(3.0)
    net.clamp_temperature()
    assert net.logit_scale.item() == 3


@pytest.mark.parametrize("changes", [{}, VIT])
def test_open_clip_reads_what_is_saved(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = _description(**changes)
    torch.manual_seed(4)
    net = CLIP(model, residual_gain=1.0).eval()
    save_model(tmp_path, net, model, margin=4)
    saved = json.loads((tmp_path / "model.json").read_text())
    peer = open_clip.CustomTextCLIP(
        **{k: v for k, v in saved["model_cfg"].items() if k != "custom_text"}
    ).eval()
    peer.load_state_dict(load_file(tmp_path / "model.safetensors"))
    image, tokens = _inputs(model)
    pixels = image / 255 - torch.tensor(saved["preprocess_cfg"]["mean"]).view(1, 3, 1, 1)
    pixels = pixels / torch.tensor(saved["preprocess_cfg"]["std"]).view(1, 3, 1, 1)
    with torch.no_grad():
        ours = net(image, tokens)
        theirs = peer(pixels, tokens)
    for one, other in zip(ours, theirs, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    again, _ = load_model(tmp_path / "model.json", tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(again(image, tokens)[0], ours[0])


def test_equal_weights_give_equal_files(tmp_path: Path) -> None:
    model = _description()
    for name in ("one", "two"):
        torch.manual_seed(4)
        (tmp_path / name).mkdir()
        save_model(tmp_path / name, CLIP(model), model, margin=0)
    for name in ("model.safetensors", "model.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "ViT-B-16-quickgelu", "RN50x4"])
def test_configurations_of_open_clip_by_name(name: str) -> None:
    model = towers.description(ModelSettings(name=name))
    with torch.device("meta"):
        visual, text = towers.build(model)
        peer = open_clip.CustomTextCLIP(**open_clip.get_model_config(name))
    assert towers.image_size(model) in (224, 288)
    assert towers.context_length(model) == 77
    for ours, theirs in ((visual, peer.visual), (text, peer.text)):
        shapes = {k: v.shape for k, v in theirs.state_dict().items()}
        assert {k: v.shape for k, v in ours.state_dict().items()} == shapes


def test_a_residual_gain_is_where_every_block_starts() -> None:
    for gain in (0.0, 1.0):
        net = CLIP(_description(), residual_gain=gain)
        gains = [
            p for n, p in net.visual.named_parameters() if n.endswith("bn3.weight") and "." in n
        ]
        blocks = [p for p in gains if p.numel() > 8]  # the stem's bn3 has 8 channels
        assert len(blocks) == 4
        assert all(bool((p == gain).all()) for p in blocks)
        assert bool((net.visual.bn3.weight == 1).all())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "ViT-B-23"}, "did you mean"),
        ({"name": "roberta-ViT-B-32"}, "linear projections"),
        ({"image_size": 50}, "not a multiple of a ResNet's stride"),
        ({"layers": [2]}, "four stages"),
        ({**VIT, "layers": [1, 2]}, "one number"),
        ({**VIT, "patch_size": 7}, "patch_size"),
        ({"text_heads": 3}, "text_heads"),
    ],
)
def test_models_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _description(**changes)


def test_tokens_are_cut_before_the_end_token() -> None:
    tokens = Tokenizer(6)("one two three four five six seven")
    assert tokens.shape == (6,)
    assert tokens[0] == 49406
    assert tokens[-1] == 49407
    assert Tokenizer(6)("CAT").tolist() == Tokenizer(6)("cat").tolist()
