"""What the processor can do at best, and what memory was used: the measures of how well it is used.

Model FLOP/s utilisation (MFU) is the share of the peak that goes into the towers' own arithmetic
(Chowdhery et al. 2022, "PaLM", appendix B).
"""

from __future__ import annotations

import regex
import torch

from pipeline import memory

# Words of the device's name -> 1e12 FLOP/s, dense: (bfloat16 with float32 sums, float32), from the
# makers' data sheets. The first whose words all occur counts; 0: not in hardware.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250, 75),
    ("H200 NVL", 835, 60),
    ("H200", 989, 67),
    ("GH200", 989, 67),
    ("H100 PCIe", 756, 51),
    ("H100 NVL", 835, 60),
    ("H100", 989, 67),
    ("H800 PCIe", 756, 51),
    ("H800", 989, 67),
    ("A100", 312, 19.5),
    ("A800", 312, 19.5),
    ("L40S", 362, 91.6),
    ("L40", 181, 90.5),
    ("L4", 121, 30.3),
    ("A40", 149.7, 37.4),
    ("A10", 125, 31.2),
    ("RTX 6000 Ada", 364, 91.1),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71, 35.6),
    ("V100 PCIE", 0, 14),
    ("V100", 0, 15.7),
    ("T4", 0, 8.1),
    ("MI300X", 1307, 163.4),
    ("MI325X", 1307, 163.4),
)


def peak_flops(name: str, *, bfloat16: bool) -> float | None:
    """FLOP/s of a GPU that torch calls `name`; None if it is not known, or is a part of one."""
    words = set(regex.findall(r"\w+", name.lower()))
    if "mig" in words:
        return None
    for known, in_bfloat16, in_float32 in _PEAKS:
        if set(known.lower().split()) <= words:
            return (in_bfloat16 if bfloat16 else in_float32) * 1e12 or None
    return None


def device_name(device: torch.device) -> str:
    """As its driver names it; `cpu` for what is no GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process held: tensors on its GPU, or else its resident memory (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory.peak_bytes()
