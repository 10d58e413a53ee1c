"""A vision transformer and its text tower as transformers' `CLIPModel` and `CLIPProcessor`.

Plain files are written; transformers is needed only by those who load them. It has no ResNet.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407

_MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}
_VISION_KEYS = {"image_size", "width", "layers", "head_width", "patch_size", "mlp_ratio"}
_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


class NotExportable(UserError):
    """A model that the format has no place for."""

    exit_code = 2


def files(
    model: Mapping[str, Any], preprocess: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(texts of the files by name, tensors for model.safetensors).

    `model` and `preprocess` are the two parts of model.json. Raises `NotExportable`.
    """
    vision, text = _towers(model)
    config = _config(model, vision, text)
    vocabulary, merges = _byte_pairs()
    context = config["text_config"]["max_position_embeddings"]
    tokens = {name: {"content": END} for name in ("eos_token", "pad_token", "unk_token")}
    tokens["bos_token"] = {"content": START}
    special = {
        name: {**token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for name, token in tokens.items()
    }
    texts = {
        "config.json": _json(config),
        "preprocessor_config.json": _json(_preprocessor(preprocess)),
        "tokenizer_config.json": _json(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": context,
                "do_lower_case": True,
                "errors": "replace",
                "add_prefix_space": False,
                **{name: token["content"] for name, token in tokens.items()},
            }
        ),
        "special_tokens_map.json": _json(special),
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
    }
    return texts, _weights(weights, vision["layers"], text["layers"])


def _towers(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The towers' settings with open_clip's defaults filled in."""
    vision, text = dict(model["vision_cfg"]), dict(model["text_cfg"])
    if not isinstance(vision.get("layers", 12), int) or vision.get("patch_size", 16) is None:
        raise NotExportable(
            "the image tower is a ResNet, which transformers' CLIPModel does not have; "
            "use FORMAT=open_clip (--format)"
        )
    foreign = sorted(
        (model.keys() - _MODEL_KEYS)
        | {f"vision_cfg.{key}" for key in vision.keys() - _VISION_KEYS}
        | {f"text_cfg.{key}" for key in text.keys() - _TEXT_KEYS}
    )
    if foreign:
        raise NotExportable(
            f"transformers' CLIPModel has nothing like {', '.join(foreign)} of this model; "
            "use FORMAT=open_clip (--format)"
        )
    vision = {
        "layers": 12,
        "width": 768,
        "head_width": 64,
        "patch_size": 16,
        "image_size": 224,
        "mlp_ratio": 4.0,
        **vision,
    }
    text = {
        "layers": 12,
        "width": 512,
        "heads": 8,
        "context_length": 77,
        "vocab_size": 49408,
        "mlp_ratio": 4.0,
        **text,
    }
    return vision, text


def _config(
    model: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]
) -> dict[str, Any]:
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    both = {"hidden_act": activation, "layer_norm_eps": 1e-5, "attention_dropout": 0.0}
    both["projection_dim"] = model["embed_dim"]
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model["embed_dim"],
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "clip_text_model",
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text["mlp_ratio"]),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "bos_token_id": START_ID,
            # Any value but 2, transformers' mark of old models, finds the end token by this number.
            "eos_token_id": END_ID,
            # The text tower is causal, so what follows the end token changes no feature.
            "pad_token_id": END_ID,
            **both,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "num_channels": 3,
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            **both,
        },
    }


def _preprocessor(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    side = preprocess["size"]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocess["resize"]},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def _weights(ours: Mapping[str, Tensor], vision: int, text: int) -> dict[str, Tensor]:
    """Our tensors under transformers' names; every one of ours is used once."""
    left = dict(ours)
    theirs = {"logit_scale": left.pop("logit_scale")}

    def take(name: str, to: str) -> None:
        for kind in ("weight", "bias"):
            theirs[f"{to}.{kind}"] = left.pop(f"{name}.{kind}")

    def take_blocks(tower: str, to: str, count: int) -> None:
        for number in range(count):
            block = f"{tower}.transformer.resblocks.{number}"
            layer = f"{to}.encoder.layers.{number}"
            for kind in ("weight", "bias"):
                stacked = left.pop(f"{block}.attn.in_proj_{kind}").chunk(3)
                for part, rows in zip("qkv", stacked, strict=True):
                    theirs[f"{layer}.self_attn.{part}_proj.{kind}"] = rows
            take(f"{block}.attn.out_proj", f"{layer}.self_attn.out_proj")
            take(f"{block}.ln_1", f"{layer}.layer_norm1")
            take(f"{block}.ln_2", f"{layer}.layer_norm2")
            take(f"{block}.mlp.c_fc", f"{layer}.mlp.fc1")
            take(f"{block}.mlp.c_proj", f"{layer}.mlp.fc2")

    for name, to in (
        ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
        ("text.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        ("text.positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ):
        theirs[to] = left.pop(name)
    # Linear layers hold [out, in], the two matrices are [in, out].
    theirs["visual_projection.weight"] = left.pop("visual.proj").T
    theirs["text_projection.weight"] = left.pop("text.text_projection").T
    take("visual.ln_pre", "vision_model.pre_layrnorm")
    take("visual.ln_post", "vision_model.post_layernorm")
    take("text.ln_final", "text_model.final_layer_norm")
    take_blocks("visual", "vision_model", vision)
    take_blocks("text", "text_model", text)
    left.pop("text.attn_mask", None)  # constant: causal
    assert not left, f"no place for {sorted(left)}"
    return {name: value.to(torch.float32).contiguous().clone() for name, value in theirs.items()}


def _byte_pairs() -> tuple[dict[str, int], list[str]]:
    """Token ids and merges, read from the file that open_clip brings and our tokenizer uses."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    text = gzip.decompress(Path(default_bpe()).read_bytes()).decode()
    # After a heading: as many merges as 49,152 tokens need besides 2 x 256 bytes and 2 marks, + 1.
    merges = text.split("\n")[1 : 49_152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["".join(merge.split()) for merge in merges]
    tokens += [START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    assert (vocabulary[START], vocabulary[END]) == (START_ID, END_ID)
    return vocabulary, merges


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
