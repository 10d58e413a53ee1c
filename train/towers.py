"""open_clip's towers, described by open_clip's own configuration format.

One description serves building, saving and reading back: `model.json` holds it, and
`open_clip.CustomTextCLIP(**model_cfg)` accepts our weights as they are.
"""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from pipeline.config import ConfigError
from train.settings import ModelSettings


def description(settings: ModelSettings) -> dict[str, Any]:
    """The model as an open_clip configuration: embed_dim, vision_cfg, text_cfg, custom_text.

    Raises `ConfigError` for an unknown name, a tower that would have to be fetched or whose
    projection is not linear, and sizes that do not fit together.
    """
    model = _custom(settings) if settings.name == "custom" else _named(settings.name)
    vision, text = model["vision_cfg"], model["text_cfg"]
    for tower in (vision, text):
        foreign = tower.get("hf_model_name") or tower.get("timm_model_pretrained")
        if foreign or "mlp" in (tower.get("timm_proj"), tower.get("proj_type")):
            raise ConfigError(
                f"train.model.name: {settings.name} is not a pair of towers with linear "
                "projections, trained from nothing; choose another, such as ViT-B-32"
            )
    return {**model, "custom_text": True}


def build(model: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """(image tower, text tower), initialised from torch's random state.

    Image tower: [batch, 3, size, size] to [batch, embed_dim]; text tower: token ids
    [batch, context] to [batch, embed_dim]. Both end in a linear projection.
    """
    import open_clip

    parts = {name: model[name] for name in ("embed_dim", "vision_cfg", "text_cfg")}
    both = open_clip.CustomTextCLIP(**parts, quick_gelu=model.get("quick_gelu", False))
    return both.visual, both.text


def blocks(tower: nn.Module) -> list[nn.Module]:
    """The residual blocks of a transformer or ResNet, from first to last."""
    from open_clip.modified_resnet import Bottleneck
    from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock

    kinds = (Bottleneck, CustomResidualAttentionBlock, ResidualAttentionBlock)
    return [module for module in tower.modules() if isinstance(module, kinds)]


def stages(tower: nn.Module) -> list[nn.Module]:
    """The four stages of a ResNet, or a transformer's blocks: similar shares of the weights."""
    from open_clip.modified_resnet import ModifiedResNet

    if isinstance(tower, ModifiedResNet):
        return [tower.layer1, tower.layer2, tower.layer3, tower.layer4]
    return blocks(tower)


def set_residual_gain(tower: nn.Module, gain: float) -> None:
    """Start every block of a ResNet with this gain of its last normalisation."""
    from open_clip.modified_resnet import Bottleneck

    for block in tower.modules():
        if isinstance(block, Bottleneck):
            nn.init.constant_(block.bn3.weight, gain)


def image_size(model: dict[str, Any]) -> int:
    """Side of the square picture that the image tower takes, pixels."""
    size = model["vision_cfg"].get("image_size", 224)
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def context_length(model: dict[str, Any]) -> int:
    """Tokens that the text tower takes."""
    return int(model["text_cfg"].get("context_length", 77))


def _named(name: str) -> dict[str, Any]:
    import open_clip

    if (model := open_clip.get_model_config(name)) is None:
        near = difflib.get_close_matches(name, ["custom", *open_clip.list_models()], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"train.model.name: open_clip has no configuration {name!r}{hint}")
    return dict(model)


def _custom(settings: ModelSettings) -> dict[str, Any]:
    vision: dict[str, Any] = {
        "image_size": settings.image_size,
        "width": settings.width,
        "head_width": settings.head_width,
    }
    if settings.tower == "resnet":
        if len(settings.layers) != 4:
            raise ConfigError("train.model.layers: a ResNet has four stages, as in [1, 1, 1, 1]")
        _divides("image_size", settings.image_size, "a ResNet's stride", 32)
        _divides("width", settings.width * 32, "head_width", settings.head_width)
        vision["layers"] = settings.layers
    else:
        if len(settings.layers) != 1:
            raise ConfigError("train.model.layers: a vision transformer has one number, as in [12]")
        _divides("image_size", settings.image_size, "patch_size", settings.patch_size)
        _divides("width", settings.width, "head_width", settings.head_width)
        vision |= {"layers": settings.layers[0], "patch_size": settings.patch_size}
    _divides("text_width", settings.text_width, "text_heads", settings.text_heads)
    text = {
        "context_length": settings.context_length,
        "width": settings.text_width,
        "heads": settings.text_heads,
        "layers": settings.text_layers,
    }
    return {"embed_dim": settings.embed_width, "vision_cfg": vision, "text_cfg": text}


def _divides(name: str, value: int, by: str, divisor: int) -> None:
    if value % divisor:
        raise ConfigError(f"train.model.{name}: {value} is not a multiple of {by} ({divisor})")
