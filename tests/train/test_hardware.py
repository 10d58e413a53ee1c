"""Utilisation is a share of the right peak, or not known."""

from __future__ import annotations

import pytest
import torch

from train.hardware import device_name, peak_flops, peak_memory_bytes


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835e12, 60e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("Tesla V100-SXM2-32GB", None, 15.7e12),  # it has no bfloat16
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None, None),
        ("NVIDIA A10G", None, None),
        ("cpu", None, None),
    ],
)
def test_peaks_by_the_names_of_drivers(
    name: str, bfloat16: float | None, float32: float | None
) -> None:
    for peak, kind in ((bfloat16, True), (float32, False)):
        assert peak_flops(name, bfloat16=kind) == (peak and pytest.approx(peak))


def test_memory_is_the_most_that_was_held() -> None:
    cpu = torch.device("cpu")
    assert device_name(cpu) == "cpu"
    before = peak_memory_bytes(cpu)
    held = bytearray(64 << 20)
    assert peak_memory_bytes(cpu) >= max(before, len(held))
    del held
    assert peak_memory_bytes(cpu) >= before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu_is_that_of_its_tensors() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before = peak_memory_bytes(device)
    held = torch.zeros(before + (64 << 20), dtype=torch.uint8, device=device)
    assert peak_memory_bytes(device) >= len(held)
    assert device_name(device) != "cuda"
