"""Presets: the paper's models with the paper's hyper-parameters, beneath what the user gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from pipeline import config
from pipeline.config import ConfigError, Settings
from train import presets, towers
from train.model import CLIP
from train.settings import TrainSettings

# Tables 18 to 20 of the paper: learning rate, embedding, resolution, image tower's depth and width,
# text tower's depth, width and heads; and parameters in millions, of OpenAI's weights.
PAPER: dict[str, tuple[Any, ...]] = {
    "RN50": (5e-4, 1024, 224, [3, 4, 6, 3], 64, 12, 512, 8, 102.0),
    "RN101": (5e-4, 512, 224, [3, 4, 23, 3], 64, 12, 512, 8, 119.7),
    "RN50x4": (5e-4, 640, 288, [4, 6, 10, 6], 80, 12, 640, 10, 178.3),
    "RN50x16": (4e-4, 768, 384, [6, 8, 18, 8], 96, 12, 768, 12, 291.0),
    "RN50x64": (3.6e-4, 1024, 448, [3, 15, 36, 10], 128, 12, 1024, 16, 623.3),
    "ViT-B/32": (5e-4, 512, 224, 12, 768, 12, 512, 8, 151.3),
    "ViT-B/16": (5e-4, 512, 224, 12, 768, 12, 512, 8, 149.6),
    "ViT-L/14": (4e-4, 768, 224, 24, 1024, 12, 768, 12, 427.6),
    "ViT-L/14@336": (2e-5, 768, 336, 24, 1024, 12, 768, 12, 427.9),
}
START = {"ViT-L/14@336": {"init_from": "l14.safetensors"}}


def of(name: str, **given: Any) -> TrainSettings:
    return TrainSettings.model_validate({"preset": name, **START.get(name, {}), **given})


def test_every_model_of_the_paper_has_a_preset() -> None:
    assert presets.PRESETS.keys() == PAPER.keys() | {"single-gpu", "cpu"}


@pytest.mark.parametrize("name", PAPER)
def test_a_preset_is_the_papers_recipe(name: str) -> None:
    lr, embed, resolution, layers, width, text_layers, text_width, heads, _ = PAPER[name]
    settings = of(name)
    assert settings.lr == lr
    family = (0.999, 1e-8) if name.startswith("RN") else (0.98, 1e-6)
    assert (settings.beta1, settings.beta2, settings.eps) == (0.9, *family)
    assert settings.weight_decay == 0.2
    assert settings.batch == 32_768
    assert settings.samples == (400e6 if name == "ViT-L/14@336" else 32 * 400e6)
    # A tenth of one epoch is 1,220 steps.
    assert settings.warmup_steps == (1220 if name == "ViT-L/14@336" else 2000)
    assert settings.model.init_temperature == 0.07
    assert settings.data.margin == 0
    model = towers.description(settings.model)
    assert (model["embed_dim"], towers.image_size(model)) == (embed, resolution)
    assert (model["vision_cfg"]["layers"], model["vision_cfg"]["width"]) == (layers, width)
    text = model["text_cfg"]
    assert (text["layers"], text["width"], text["heads"]) == (text_layers, text_width, heads)
    assert towers.context_length(model) == 77
    assert model["quick_gelu"]


@pytest.mark.parametrize("name", PAPER)
def test_a_presets_model_is_open_clips_of_that_name(name: str) -> None:
    with torch.device("meta"):
        net = CLIP(towers.description(of(name).model))
        wanted = open_clip.get_model_config(name.replace("/", "-").replace("@", "-") + "-quickgelu")
        peer = open_clip.CustomTextCLIP(**wanted)
    shapes = {key: value.shape for key, value in peer.state_dict().items()}
    assert {key: value.shape for key, value in net.state_dict().items()} == shapes
    count = sum(p.numel() for p in net.parameters())
    assert round(count / 1e6, 1) == PAPER[name][-1]
    # Between a tower's last layer and the common space lies a matrix, and nothing else.
    assert isinstance(net.text.text_projection, nn.Parameter)
    if name.startswith("ViT"):
        assert isinstance(net.visual.proj, nn.Parameter)
    else:
        assert isinstance(net.visual.attnpool.c_proj, nn.Linear)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["single-gpu", "cpu"])
def test_small_presets_can_be_built(name: str) -> None:
    settings = of(name)
    assert settings.batch % settings.data.lanes == 0
    with torch.device("meta"):
        CLIP(towers.description(settings.model))


def test_only_weights_decay() -> None:
    from train.optim import parameter_groups

    with torch.device("meta"):
        net = CLIP(towers.description(of("ViT-B/32").model))
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    decayed: set[str] = set()
    kept: set[str] = set()
    for group in parameter_groups(net, 0.2):
        named = {names[id(p)] for p in group["params"]}  # type: ignore[attr-defined]
        (decayed if group["weight_decay"] else kept).update(named)
    assert decayed | kept == set(names.values())
    assert {"text.token_embedding.weight", "visual.conv1.weight", "visual.proj"} <= decayed
    assert not {name for name in decayed if name.endswith("bias") or "ln_" in name}
    assert {"logit_scale", "visual.ln_post.weight", "text.ln_final.bias"} <= kept


def test_the_users_keys_lie_above_the_preset() -> None:
    settings = of("RN50", weight_decay=0.1, model={"init_temperature": 0.05}, data={"margin": 8})
    assert settings.weight_decay == 0.1
    assert settings.beta2 == 0.999
    assert (settings.model.name, settings.model.init_temperature) == ("RN50-quickgelu", 0.05)
    assert settings.data.margin == 8
    assert presets.PRESETS["RN50"]["model"]["init_temperature"] == 0.07


def test_another_loss_has_its_own_temperature() -> None:
    assert of("ViT-B/32", loss="siglip").model.init_temperature is None
    assert (
        of("ViT-B/32", loss="siglip", model={"init_temperature": 0.2}).model
        == of("ViT-B/32", model={"init_temperature": 0.2}).model
    )


def test_without_a_preset_it_is_vit_b_32() -> None:
    assert TrainSettings() == of("ViT-B/32")


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("ViT-B-32", "ViT-B/32"),
        ("ViT-B-32-quickgelu", "ViT-B/32"),
        ("vit-l/14", "ViT-L/14"),
        ("ViT-L-14-336", "ViT-L/14@336"),
        ("ViT-L/14@336px", "ViT-L/14@336"),
        ("rn50x4-quickgelu", "RN50x4"),
    ],
)
def test_open_clips_spelling_is_understood(spelling: str, name: str) -> None:
    settings = of(spelling, init_from="l14.safetensors")
    assert settings.preset == name
    assert settings == of(name, init_from="l14.safetensors")


@pytest.mark.parametrize(
    ("batch", "samples", "lr", "warmup_steps"),
    [
        (32_768, 12_800_000_000, 5e-4, 2000),
        (8192, 12_800_000_000, 2.5e-4, 8000),  # a quarter of the batch: half the rate
        (2048, 400_000_000, 1.25e-4, 19_531),  # a tenth of 195,313 steps, not 32,000
        (65_536, 12_800_000_000, 5e-4, 1000),  # a larger batch does not raise the rate
    ],
)
def test_rate_and_warm_up_follow_the_batch(
    batch: int, samples: int, lr: float, warmup_steps: int
) -> None:
    settings = of("ViT-B/32", batch=batch, samples=samples)
    assert (settings.lr, settings.warmup_steps) == (lr, warmup_steps)


def test_what_is_given_is_not_derived() -> None:
    settings = of("ViT-B/32", batch=2048, lr="3e-4")
    assert settings.lr == 3e-4
    assert settings.warmup_steps == 32_000
    assert of("ViT-B/32", batch=2048, warmup_steps=7).warmup_steps == 7


class Root(Settings):
    train: TrainSettings = TrainSettings()


def _file(folder: Path, text: str) -> Path:
    (folder / "x.yaml").write_text(text)
    return folder / "x.yaml"


def test_the_dump_says_everything_and_loads_as_the_same(tmp_path: Path) -> None:
    path = _file(tmp_path, "train: {preset: RN50x16, batch: 2048, samples: 4.0e+8}")
    loaded = config.load(Root, path)
    written = config.dump(loaded)
    for line in ("lr: 0.0001", "beta2: 0.999", "name: RN50x16-quickgelu", "warmup_steps: 19531"):
        assert f" {line}\n" in written
    again = config.load(Root, _file(tmp_path, written))
    assert again == loaded
    bare = _file(tmp_path, written.replace("preset: RN50x16", "preset: RN50"))
    assert config.load(Root, bare).train.identity() == loaded.train.identity()


def test_config_says_what_is_derived(tmp_path: Path) -> None:
    path = _file(tmp_path, "train: {preset: ViT-B/32, batch: 8192, warmup_steps: 5}")
    said = "\n".join(config.explain(config.load(Root, path)))
    derived = "# Derived from batch: 0.0005 x sqrt(8,192 / 32,768) = 0.00025.\n  lr: 0.00025"
    assert derived in said
    assert "# Given; batch and samples would make it 65,536,000 pairs" in said
    said = "\n".join(config.explain(config.load(Root, _file(tmp_path, "train: {}"))))
    assert "Derived" not in said and "Given" not in said


def test_a_preset_that_there_is_not_is_reported_where_it_is_given(tmp_path: Path) -> None:
    path = _file(tmp_path, "train:\n  seed: 1\n  preset: cpu")
    with pytest.raises(ConfigError, match=r"^train\.preset=ViT-B/23: train\.preset: there is no"):
        config.load(Root, path, ["train.preset=ViT-B/23"])
    with pytest.raises(ConfigError, match=r"x\.yaml:3: train\.preset: there is no 'cup'"):
        config.load(Root, _file(tmp_path, path.read_text().replace("cpu", "cup")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  preset: ViT-B/23", r"there is no 'ViT-B/23'; did you mean ViT-B/32"),
        ("train:\n  preset: 7", r"there are RN50, RN101"),
        ("train:\n  preset: ViT-L/14@336", r"set train.init_from to the .* of a ViT-L/14"),
        ("train:\n  batch: many", r"x\.yaml:2: train\.batch: "),
        ("train:\n  model: small", r"x\.yaml:2: train\.model: "),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.load(Root, _file(tmp_path, text))
