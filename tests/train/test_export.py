"""Exported folders load elsewhere, offline, and give the features that we evaluate with."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from pipeline import runner
from pipeline.__main__ import main
from pipeline.config import ConfigError, MissingInput
from pipeline.stage import Attempt, Run
from tests.train.conftest import TINY_MODEL, Config, Pack, picture
from tests.train.evaluate.test_zero_shot import NAMES, _write
from tests.train.published import publish_pack, work
from train import huggingface, stages, towers
from train.data.decode import central_crop, decode
from train.export import Format, export
from train.model import CLIP, Tokenizer, load_model
from train.presets import PRESETS
from train.settings import EvaluateSettings, ModelSettings

VIT = {**TINY_MODEL, "tower": "vit", "layers": [2], "width": 32, "head_width": 16}
TEXTS = ["a red picture", "Two Dogs,\u00a0running!", "naïve café № 5", "one " * 30, ""]
Make = Callable[..., Attempt]


@pytest.fixture
def trained(pack: Pack, attempt: Make, tmp_path: Path) -> Callable[..., Run]:
    """A run that trained a model of some description, and evaluated it."""

    def make(model: dict[str, Any], margin: int = 4) -> Run:
        data = {"lanes": 4, "block_samples": 5, "margin": margin}
        run = attempt(pack(20, 13), samples=160, model=model, data=data).run
        rows = [(picture(seed)[0], seed % 3) for seed in range(12)]
        _write(tmp_path / "set.parquet", rows, NAMES, ["a {} picture"])
        evaluated = EvaluateSettings(datasets={"paints": str(tmp_path / "set.parquet")}, threads=1)
        run = Run(run.folder, Config(train=run.settings("train"), evaluate=evaluated))
        publish_pack(run, tmp_path / "packed")
        work(run, stages.TRAIN)
        work(run, stages.EVALUATE)
        return run

    return make


def ours(run: Run) -> tuple[CLIP, dict[str, Any]]:
    return load_model(run.path("train:model.json"), run.path("train:model.safetensors"))


def jpeg(width: int, height: int) -> tuple[bytes, Image.Image]:
    """A smooth picture: scaling it by another method changes it little."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([x, y, 255 - (x + y) / 2], axis=2).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, subsampling=0)
    return stream.getvalue(), Image.open(io.BytesIO(stream.getvalue())).convert("RGB")


def preprocessed(net: CLIP, data: bytes, preprocess: dict[str, Any]) -> torch.Tensor:
    """[3, side, side]: what our image tower sees of a picture in evaluation."""
    pixels = central_crop(decode(data, preprocess["resize"]), preprocess["size"])
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    normalised: torch.Tensor = (image.float() - net._mean) * net._inverse_std
    return normalised[0]


@pytest.mark.parametrize("model", [VIT, TINY_MODEL], ids=["vit", "resnet"])
def test_open_clip_gives_the_same_features(
    trained: Callable[..., Run], tmp_path: Path, model: dict[str, Any]
) -> None:
    run = trained(model)
    folder = export(run, "open_clip", tmp_path / "exported")
    net, saved = ours(run)
    peer, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    peer.eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    tokens = Tokenizer(8).batch(TEXTS)
    assert torch.equal(tokenize(TEXTS), tokens)
    image = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        pixels = (image.float() - net._mean) * net._inverse_std
        theirs = peer.encode_image(pixels, normalize=True), peer.encode_text(tokens, normalize=True)
        features = net.encode_image(image), net.encode_text(tokens)
    for one, other in zip(features, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert torch.equal(peer.logit_scale, net.logit_scale)
    # The line that the README gives for a margin, which open_clip's files cannot express.
    assert "preprocess.transforms[0].size = 36" in (folder / "README.md").read_text()
    preprocess.transforms[0].size = 36
    data, decoded = jpeg(52, 36)
    difference = (preprocess(decoded) - preprocessed(net, data, saved["preprocess_cfg"])).abs()
    assert difference.max() < 0.05  # a level of brightness is 0.015; decoders differ by one or two
    data, decoded = jpeg(120, 90)
    difference = (preprocess(decoded) - preprocessed(net, data, saved["preprocess_cfg"])).abs()
    assert difference.mean() < 0.05


def test_without_a_margin_open_clip_needs_no_extra_line(
    trained: Callable[..., Run], tmp_path: Path
) -> None:
    run = trained(VIT, margin=0)
    folder = export(run, "open_clip", tmp_path / "exported")
    net, saved = ours(run)
    *_, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert "preprocess.transforms" not in (folder / "README.md").read_text()
    data, decoded = jpeg(40, 32)
    difference = (preprocess(decoded) - preprocessed(net, data, saved["preprocess_cfg"])).abs()
    assert difference.max() < 0.05


TRANSFORMERS = """
import sys
import numpy as np, torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor
folder, inputs, outputs = sys.argv[1:]
model, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
processor = CLIPProcessor.from_pretrained(folder)
given = np.load(inputs)
tokens = processor.tokenizer(
    given["texts"].tolist(), padding="max_length", truncation=True, return_tensors="pt"
)
shown = processor.image_processor(Image.fromarray(given["shown"]), return_tensors="pt")
with torch.no_grad():
    made = model(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        pixel_values=torch.from_numpy(given["pixels"]),
    )
np.savez(
    outputs,
    ids=tokens["input_ids"],
    image=made.image_embeds,
    text=made.text_embeds,
    logits=made.logits_per_image,
    shown=shown["pixel_values"],
)
"""


@pytest.mark.timeout(170)
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_transformers_gives_the_same_features(
    trained: Callable[..., Run], tmp_path: Path, quick_gelu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    if quick_gelu:  # which no model that is described field by field has
        described = towers._custom
        monkeypatch.setattr(towers, "_custom", lambda s: {**described(s), "quick_gelu": True})
    run = trained(VIT)
    folder = export(run, "huggingface", tmp_path / "exported")
    net, saved = ours(run)
    image = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    data, decoded = jpeg(52, 36)
    pixels = ((image.float() - net._mean) * net._inverse_std).numpy()
    given = {"texts": TEXTS, "pixels": pixels, "shown": np.asarray(decoded)}
    np.savez(tmp_path / "in.npz", **given)
    paths = [str(path) for path in (folder, tmp_path / "in.npz", tmp_path / "out.npz")]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRANSFORMERS, *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = {name: torch.from_numpy(a) for name, a in np.load(tmp_path / "out.npz").items()}

    tokens = Tokenizer(8).batch(TEXTS)
    end = tokens.argmax(1)
    for row, other, last in zip(tokens, theirs["ids"], end, strict=True):
        assert row[: last + 1].tolist() == other[: last + 1].tolist()
        assert set(other[last + 1 :].tolist()) <= {49407}
    with torch.no_grad():
        images, texts, scale = net(image, tokens)
    torch.testing.assert_close(theirs["image"], images, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs["text"], texts, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs["logits"], scale * images @ texts.T, rtol=0, atol=2e-4)
    shown = preprocessed(net, data, saved["preprocess_cfg"])
    assert (theirs["shown"][0] - shown).abs().max() < 0.05
    if quick_gelu:  # the activation is told apart: with the other one features differ
        again = dict(saved["model_cfg"], quick_gelu=False)
        plain = CLIP(again).eval()
        plain.load_state_dict(net.state_dict())
        with torch.no_grad():
            assert (plain.encode_image(image) - images).abs().max() > 1e-4


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("ViT")])
def test_every_vision_transformer_fits_transformers_names_and_shapes(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = towers.description(ModelSettings(name=PRESETS[name]["model"]["name"]))
    preprocess = {"size": 224, "resize": 224, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with torch.device("meta"):
        texts, tensors = huggingface.files(model, preprocess, CLIP(model).state_dict())
        peer = transformers.CLIPModel(transformers.CLIPConfig(**json.loads(texts["config.json"])))
    shapes = {key: value.shape for key, value in tensors.items()}
    assert {key: value.shape for key, value in peer.state_dict().items()} == shapes


def test_the_whole_vocabulary_is_there() -> None:
    vocabulary, merges = huggingface._byte_pairs()
    known = SimpleTokenizer()
    assert len(vocabulary) == len(known.encoder) == 49_408
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    assert vocabulary == {renamed.get(token, token): n for token, n in known.encoder.items()}
    assert [tuple(merge.split()) for merge in merges] == list(known.bpe_ranks)


def test_the_card_says_where_the_model_comes_from(
    trained: Callable[..., Run], tmp_path: Path
) -> None:
    run = trained(VIT)
    card = (export(run, "huggingface", tmp_path / "one") / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "| dataset fingerprint | `packed(20, 13)` |" in card
    assert "| pairs in the dataset | 33 |" in card
    assert "| pairs seen, repetitions counted | 160 |" in card
    assert "\nlr: 0.002\n" in card
    top1 = json.loads(run.path("evaluate:evaluation.json").read_text())["paints"]["top1"]
    assert f"| paints | {top1:.1%} |" in card
    # Figures of another model, or of other pictures, are not this model's.
    changed = run.settings("evaluate").model_copy(update={"datasets": {}})
    other = Run(run.folder, Config(train=run.settings("train"), evaluate=changed))
    assert (
        "Not evaluated." in (export(other, "open_clip", tmp_path / "two") / "README.md").read_text()
    )


@pytest.mark.parametrize("format", ["open_clip", "huggingface"])
def test_a_folder_is_whole_or_not_there(
    trained: Callable[..., Run], tmp_path: Path, format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(VIT)
    export(run, format, tmp_path / "one")
    export(run, format, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        export(run, format, tmp_path / "one")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("train.export.save_file", full)
    with pytest.raises(OSError, match="No space"):
        export(run, format, tmp_path / "three")
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_line_exports(
    trained: Callable[..., Run],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.log.configure", lambda **_: None)  # it would outlive the test
    run = trained(VIT)
    runner.describe(run, [stages.TRAIN, stages.EVALUATE])
    command = ["export", str(run.folder), "--to", str(tmp_path / "new" / "exported")]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "exported")
    names = {path.name for path in (tmp_path / "new" / "exported").iterdir()}
    assert names == {"README.md", "open_clip_config.json", "open_clip_model.safetensors"}
    assert main(command) == 2  # it is there already
    assert main(["export", str(tmp_path / "nowhere"), "--to", str(tmp_path / "other")]) == 3
    assert not (tmp_path / "other").exists()


def test_a_resnet_is_no_clip_model_of_transformers(
    trained: Callable[..., Run], tmp_path: Path
) -> None:
    with pytest.raises(huggingface.NotExportable, match=r"ResNet.*FORMAT=open_clip \(--format\)"):
        export(trained(TINY_MODEL), "huggingface", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_what_transformers_lacks_is_named() -> None:
    model = towers.description(ModelSettings(name="ViT-B-32"))
    model["text_cfg"] = {**model["text_cfg"], "pool_type": "last"}
    model["init_logit_bias"] = -10  # SigLIP's
    with pytest.raises(huggingface.NotExportable, match=r"init_logit_bias, text_cfg\.pool_type"):
        huggingface.files(model, {}, {})


def test_nothing_trained_is_said(attempt: Make, pack: Pack, tmp_path: Path) -> None:
    run = attempt(pack(8)).run
    with pytest.raises(
        MissingInput, match=f"no model is trained here; run `make train RUN={run.folder}`"
    ):
        export(run, "open_clip", tmp_path / "exported")
