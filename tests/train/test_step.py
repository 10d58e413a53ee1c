"""A step under every way to run the towers: one process, threads, DDP and FSDP2 agree."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.step import Peer, normalised
from pipeline.config import ConfigError
from tests.train.conftest import TINY_MODEL
from tests.train.ranks import together
from train import parallel, towers
from train.checkpoint import Checkpointer, Progress
from train.data.loader import Batch
from train.distributed import Process
from train.model import CLIP, load_model, save_model
from train.settings import CheckpointSettings, TrainSettings
from train.step import Taken, TrainStep

VIT = {**TINY_MODEL, "tower": "vit", "layers": [2], "width": 16, "head_width": 8}
CPU = torch.device("cpu")
BATCH, STEPS = 8, 5
MAX_GRAD_NORM = 0.5


def _settings(**changes: Any) -> TrainSettings:
    settings = {
        "seed": 3,
        "batch": BATCH,
        "data": {"lanes": 1},
        "model": VIT,
        "precision": "float32",
        "lr": 1e-3,
        "warmup_steps": 2,
        "clip_gradients": True,
        "max_grad_norm": MAX_GRAD_NORM,
        "loss_tile": 3,
    }
    return TrainSettings.model_validate(settings | changes)


def _step(settings: TrainSettings, rank: int = 0, world: int = 1) -> TrainStep:
    described = towers.description(settings.model)
    return TrainStep(settings, STEPS, described, Process(rank, world, CPU))


def _batch(number: int, rank: int = 0, world: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(number)
    image = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 400, (BATCH, 8), generator=generator)
    tokens[:, -1] = 49407
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    return Batch(number, image[part], tokens[part], [], 0, [])


def _curve(step: TrainStep, rank: int = 0, world: int = 1, first: int = 0) -> list[Taken]:
    return [step(_batch(number, rank, world)) for number in range(first, STEPS)]


def _agree(actual: list[Taken], expected: list[Taken], rtol: float = 2e-4) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert asdict(one) == pytest.approx(asdict(other), rel=rtol)


def _weights(net: CLIP) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def _assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # AdamW turns rounding of a gradient near 0 into a step of the learning rate's size.
        torch.testing.assert_close(actual[name], value, rtol=1e-2, atol=2e-3, msg=name)


CASES: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "ddp in chunks": {"parallel": "ddp", "chunk": 2},
    "fsdp": {"parallel": "fsdp"},
    "fsdp in chunks": {"parallel": "fsdp", "chunk": 2},
    "fsdp repeated": {"parallel": "fsdp", "checkpoint_activations": True},
    "siglip, ddp": {"parallel": "ddp", "loss": "siglip"},
    "siglip, fsdp": {"parallel": "fsdp", "loss": "siglip", "chunk": 2},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes did in every case."""
    folder = tmp_path_factory.mktemp("pair")
    together(folder, 2, _pair)
    return folder


def _pair(rank: int, world: int, folder: Path) -> None:
    for case, changes in CASES.items():
        step = _step(_settings(**changes), rank, world)
        curve = _curve(step, rank, world)
        local = [p.grad for p in step.net.parameters()]
        norm = parallel.gradient_norm(step.net.parameters())
        saved = {
            "curve": [asdict(taken) for taken in curve],
            "sharded": sum(isinstance(grad, DTensor) for grad in local),
            "clipped_norm": float(norm),
        }
        net = step.whole_net()
        if rank == 0:
            saved["weights"] = _weights(net)
        torch.save(saved, folder / f"{case}-{rank}.pt")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case: str, pair: Path) -> None:
    changes = {name: value for name, value in CASES[case].items() if name == "loss"}
    alone = _step(_settings(**changes))
    expected = _curve(alone)
    assert all(taken.grad_norm > MAX_GRAD_NORM for taken in expected)
    for rank in range(2):
        saved = torch.load(pair / f"{case}-{rank}.pt")
        _agree([Taken(**taken) for taken in saved["curve"]], expected)
        # All but the temperature and SigLIP's bias are sharded, or nothing is.
        scalars = 1 + ("siglip" in case)
        sharded = len(list(alone.net.parameters())) - scalars if "fsdp" in case else 0
        assert saved["sharded"] == sharded
        assert saved["clipped_norm"] == pytest.approx(MAX_GRAD_NORM, rel=1e-4)
    _assert_near(torch.load(pair / f"{case}-0.pt")["weights"], _weights(alone.net))


def test_a_state_written_one_way_is_read_another(tmp_path: Path) -> None:
    """Saved by FSDP on two processes; continued by DDP on two, FSDP on two, and by one."""
    together(tmp_path, 2, _save)
    together(tmp_path, 2, _load)
    whole = _curve(_step(_settings()))
    alone = _step(_settings())
    _restore(alone, tmp_path / "checkpoints")
    _agree(_curve(alone, first=2), whole[2:])
    for mode in ("ddp", "fsdp"):
        curve = torch.load(tmp_path / f"{mode}.pt")
        _agree([Taken(**taken) for taken in curve], whole[2:])


def _checkpointer(step: TrainStep, folder: Path) -> Checkpointer:
    settings = CheckpointSettings()
    return Checkpointer(folder, "digest", step.net, step.optimizer, settings, step.process)


def _save(rank: int, world: int, folder: Path) -> None:
    step = _step(_settings(parallel="fsdp"), rank, world)
    for number in range(2):
        step(_batch(number, rank, world))
    with _checkpointer(step, folder / "checkpoints") as saving:
        saving.after_step(Progress(2), now=True)


def _load(rank: int, world: int, folder: Path) -> None:
    for mode in ("ddp", "fsdp"):
        step = _step(_settings(parallel=mode, seed=4), rank, world)
        _restore(step, folder / "checkpoints")
        step.settings = _settings(parallel=mode)
        curve = _curve(step, rank, world, first=2)
        if rank == 0:
            torch.save([asdict(taken) for taken in curve], folder / f"{mode}.pt")


def _restore(step: TrainStep, folder: Path) -> None:
    with _checkpointer(step, folder) as saving:
        assert saving.resume() == Progress(2)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("chunk", ["all", 2])
@pytest.mark.usefixtures("two_threads")
def test_towers_on_threads_change_nothing(chunk: int | str) -> None:
    threaded = _step(_settings(chunk=chunk))
    assert isinstance(threaded._towers, parallel.Threaded)
    plain = _step(_settings(chunk=chunk))
    plain._towers = parallel.Towers(plain.net, plain.process, bfloat16=False)
    _agree(_curve(threaded), _curve(plain), rtol=1e-5)
    again = _step(_settings(chunk=chunk))
    assert _curve(again) == _curve(_step(_settings(chunk=chunk)))


@pytest.mark.usefixtures("two_threads")
def test_threads_are_not_for_text_towers_that_draw() -> None:
    net = _step(_settings()).net
    net.text.transformer.resblocks[0].attn.dropout = 0.1  # type: ignore[union-attr,index]
    placed = parallel.place(net, _settings(), Process(0, 1, CPU), bfloat16=False)
    assert type(placed) is parallel.Towers


@pytest.mark.parametrize("model", [VIT, {**TINY_MODEL, "residual_gain": 1.0}])
def test_repeated_blocks_change_no_bit(model: dict[str, Any]) -> None:
    """Running statistics included, though a ResNet's blocks see every batch twice."""
    kept, repeated = (
        _step(_settings(model=model, checkpoint_activations=on)) for on in (False, True)
    )
    assert _curve(kept) == _curve(repeated)
    expected = _weights(kept.net)
    for name, value in _weights(repeated.net).items():
        assert torch.equal(value, expected[name]), name


def test_figures_are_those_of_the_batch() -> None:
    step = _step(_settings())
    batch = _batch(0)
    with torch.no_grad():
        images, texts, scale = step.net(batch.image, batch.tokens)
    logits, labels = scale * images @ texts.T, torch.arange(BATCH)
    taken = step(batch)
    for logit, loss, accuracy in (
        (logits, taken.loss_image_to_text, taken.accuracy_image_to_text),
        (logits.T, taken.loss_text_to_image, taken.accuracy_text_to_image),
    ):
        expected = torch.nn.functional.cross_entropy(logit, labels).item()
        assert loss == pytest.approx(expected, rel=1e-5)
        assert accuracy == pytest.approx((logit.argmax(1) == labels).float().mean().item())
    assert taken.loss == pytest.approx((taken.loss_image_to_text + taken.loss_text_to_image) / 2)


def test_weights_of_pairs_reach_the_loss() -> None:
    plain, weighed = _step(_settings()), _step(_settings())
    seen = []

    def no_negatives(batch: Batch) -> Any:
        seen.append(batch.step)
        bias = torch.full((BATCH, BATCH), float("-inf")).fill_diagonal_(0)
        return lambda start, stop: bias[start:stop]

    weighed.pair_bias = no_negatives
    assert weighed(_batch(0)).loss == pytest.approx(0, abs=1e-6)
    assert plain(_batch(0)).loss > 1
    assert seen == [0]
    siglip = _step(_settings(loss="siglip"))
    siglip.pair_bias = no_negatives
    with pytest.raises(ConfigError, match=r"train\.loss"):
        siglip(_batch(0))


def test_siglip_starts_where_its_paper_does_and_is_not_clamped(tmp_path: Path) -> None:
    step = _step(_settings(loss="siglip"))
    net = step.net
    assert net.logit_scale.exp().item() == pytest.approx(10)
    assert net.logit_bias is not None
    assert net.logit_bias.item() == -10
    net.logit_scale.data.fill_(math.log(200))
    step(_batch(0))
    assert net.logit_scale.exp().item() > 150
    contrastive = _step(_settings())
    contrastive.net.logit_scale.data.fill_(math.log(200))
    contrastive(_batch(0))
    assert contrastive.net.logit_scale.exp().item() <= 100 + 1e-3
    save_model(tmp_path, net, towers.description(step.settings.model), margin=0)
    again, _ = load_model(tmp_path / "model.json", tmp_path / "model.safetensors")
    assert torch.equal(torch.stack(again.scalars()), torch.stack(net.scalars()))


def test_a_step_that_is_not_finite_leaves_all_as_it_was() -> None:
    step = _step(_settings(model=TINY_MODEL))
    step(_batch(0))
    before = _weights(step.net)
    step.pair_bias = lambda batch: lambda start, stop: torch.full((1,), float("nan"))
    taken = step(_batch(1))
    assert not taken.finite
    for name, value in _weights(step.net).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("model", [VIT, {**TINY_MODEL, "residual_gain": 1.0}])
def test_a_hundred_steps_follow_open_clips_loop(model: dict[str, Any]) -> None:
    """From equal weights, set alike: its model class, ClipLoss, AdamW and loop."""
    settings = _settings(model=model, clip_gradients=False, lr=5e-4, warmup_steps=10)
    described = towers.description(settings.model)
    ours = TrainStep(settings, 100, described, Process(0, 1, CPU))
    peer = Peer(settings, 100, _weights(ours.net), CPU)
    curves: tuple[list[float], list[float]] = ([], [])
    for number in range(100):
        batch = replace(_batch(number % 4), step=number)
        curves[0].append(ours(batch).loss)
        curves[1].append(peer(number, normalised(batch.image), batch.tokens))
    assert curves[0] == pytest.approx(curves[1], rel=1e-3, abs=1e-3)
    assert sum(curves[0][-4:]) < 0.7 * sum(curves[0][:4])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it
@pytest.mark.parametrize("changes", [{}, {"checkpoint_activations": True}])
def test_compiled_towers_compute_the_same(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated ahead of time; making kernels of that would take minutes here."""
    traced: list[object] = []

    def compile_without_kernels(forward: Any) -> Any:
        traced.append(forward)
        return ahead_of_time(forward, backend="aot_eager")

    ahead_of_time = torch.compile
    plain = _curve(_step(_settings()))
    monkeypatch.setattr(torch, "compile", compile_without_kernels)
    compiled = _step(_settings(compile=True, **changes))
    _agree(_curve(compiled), plain, rtol=1e-3)
    assert len(traced) == (3 if changes else 2)  # blocks, or towers


def test_large_models_are_sharded() -> None:
    def mode(name: str, **changes: Any) -> str:
        settings = _settings(model={"name": name}, **changes)
        with torch.device("meta"):
            net = CLIP(towers.description(settings.model))
        return parallel._mode(net, settings, Process(0, 2, CPU))

    assert mode("ViT-L-14") == "ddp"
    assert mode("ViT-H-14") == "fsdp"
    assert mode("ViT-H-14", parallel="ddp") == "ddp"
    assert parallel._mode(_step(_settings()).net, _settings(), Process(0, 1, CPU)) == "alone"


def test_statistics_are_synchronised_on_gpus_only() -> None:
    with pytest.raises(ConfigError, match=r"train\.sync_batchnorm"):
        _step(_settings(sync_batchnorm=True))


@pytest.mark.parametrize(("name", "expected"), [("ViT-B-32", 14.78e9), ("RN50", 18.18e9)])
def test_flops_are_those_of_open_clips_profile(name: str, expected: float) -> None:
    """Its `model_profile.csv` counts a forward pass; training takes three times that."""
    from train.flops import training_flops

    described = towers.description(_settings(model={"name": name}).model)
    assert training_flops(described) == pytest.approx(3 * expected, rel=1e-3)
    assert _step(_settings()).flops_per_sample > 0
