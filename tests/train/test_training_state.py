"""States of plain, DDP and FSDP2 models: saved by any number of ranks, loaded by any other."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tests.train.toy_training import Toy, alone, group, on_ranks
from train.checkpoint import Progress
from train.distributed import Process
from train.training_state import TrainingState

KINDS = (("plain", 1), ("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4))


def test_any_kind_on_any_number_of_ranks_loads_what_any_other_saved(tmp_path: Path) -> None:
    on_ranks(4, _save_all_load_all, str(tmp_path))


def _save_all_load_all(rank: int, where: str) -> None:
    folder = Path(where)
    for kind, world in KINDS:
        if rank >= world:
            continue
        name = f"{kind}{world}"
        with group(folder / f"save-{name}", rank, world) as process:
            toy = Toy(kind, process)
            for number in range(3):
                toy.step(number)
            with toy.checkpointer(folder / name) as saving:
                saving.after_step(Progress(3), now=True)
            tensors = toy.tensors()
            if process.leads:
                torch.save(tensors, folder / f"{name}.pt")
            process.wait()
    for kind, world in KINDS:
        if rank >= world:
            continue
        with group(folder / f"load-{kind}{world}", rank, world) as process:
            for saver, count in KINDS:
                toy = Toy(kind, process)
                toy.step(99)
                with toy.checkpointer(folder / f"{saver}{count}") as saving:
                    assert saving.resume() == Progress(3)
                expected = torch.load(folder / f"{saver}{count}.pt", weights_only=True)
                actual = toy.tensors()
                assert actual.keys() == expected.keys()
                for tensor in expected:
                    assert torch.equal(actual[tensor], expected[tensor]), (saver, kind, tensor)
                process.wait()


def test_replicas_are_written_once_and_by_all(tmp_path: Path) -> None:
    on_ranks(2, _save_replicas, str(tmp_path))
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("ddp/step-*/__*.distcp"))]
    alone_ = Toy("plain", alone(), width=2000)
    alone_.step(0)
    with alone_.checkpointer(tmp_path / "plain") as saving:
        saving.after_step(Progress(1), now=True)
    [whole] = [path.stat().st_size for path in tmp_path.glob("plain/step-*/__*.distcp")]
    assert len(sizes) == 2
    assert sum(sizes) == pytest.approx(whole, rel=0.05)
    assert max(sizes) < 0.6 * whole


def _save_replicas(rank: int, where: str) -> None:
    with group(Path(where) / "meet", rank, 2) as process:
        toy = Toy("ddp", process, width=2000)
        toy.step(0)
        with toy.checkpointer(Path(where) / "ddp") as saving:
            saving.after_step(Progress(1), now=True)


def test_a_copy_is_of_its_moment_and_saving_changes_nothing() -> None:
    toy, undisturbed = Toy("plain", alone()), Toy("plain", alone())
    state = TrainingState(toy.net, toy.optimizer, alone())
    toy.step(0)
    before = toy.tensors()
    share = state.copy()
    undisturbed.step(0)
    for number in range(1, 4):
        assert toy.step(number) == undisturbed.step(number)
    copied = {index.fqn: value for index, value in share.data.items()}
    for name, value in before.items():
        prefixed = name if name.startswith("model.") else f"optimizer.{name}"
        assert torch.equal(copied.pop(prefixed), value)
    assert not copied
    assert not torch.equal(toy.tensors()["model.first.weight"], before["model.first.weight"])


def test_a_state_without_a_step_is_saved_and_loaded_without_making_one(tmp_path: Path) -> None:
    """As when all steps so far were skipped: torch's own getters would make a step of theirs."""
    toy = Toy("plain", alone())
    with toy.checkpointer(tmp_path) as saving:
        saving.after_step(Progress(2, skipped=2), now=True)
    assert not toy.optimizer.state
    other = Toy("plain", alone())
    other.step(7)
    with other.checkpointer(tmp_path) as saving:
        assert saving.resume() == Progress(2, skipped=2)
    assert not other.optimizer.state
    assert [toy.step(n) for n in range(3)] == [other.step(n) for n in range(3)]


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    toy = Toy("plain", alone())
    toy.step(0)
    with toy.checkpointer(tmp_path) as saving:
        saving.after_step(Progress(1), now=True)
    with (
        Toy("plain", alone(), width=9).checkpointer(tmp_path) as saving,
        pytest.raises(ValueError, match=r"[Ss]ize"),
    ):
        saving.resume()


def test_torch_reads_a_checkpoint_without_us(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    toy = Toy("plain", alone())
    toy.step(0)
    with toy.checkpointer(tmp_path) as saving:
        saving.after_step(Progress(1), now=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch say that there is one process
        dcp_to_torch_save(tmp_path / "step-0000000001", tmp_path / "whole.pt")
    model = torch.load(tmp_path / "whole.pt", weights_only=True)["model"]
    assert torch.equal(model["last.weight"], toy.net.last.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_state_is_copied_into_pinned_memory_of_its_moment(tmp_path: Path) -> None:
    process = Process(0, 1, torch.device("cuda", 0))
    toy = Toy("plain", process, width=2000)
    toy.step(0)
    moment = toy.tensors()
    with toy.checkpointer(tmp_path, max_lost_steps=2) as saving:
        saving.after_step(Progress(1))
        toy.step(1)  # goes on at once, while the copy is written
    share = TrainingState(toy.net, toy.optimizer, process).copy()
    assert all(value.is_pinned() for value in share.data.values())
    for other in (Toy("plain", process, width=2000), Toy("plain", alone(), width=2000)):
        with other.checkpointer(tmp_path) as saving:
            assert saving.resume() == Progress(1)
        loaded = other.tensors()
        assert all(torch.equal(loaded[name].cpu(), moment[name].cpu()) for name in moment)
