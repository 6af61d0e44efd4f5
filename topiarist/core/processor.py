"""What the processor says of itself."""

from __future__ import annotations

import functools
from pathlib import Path

import torch


@functools.cache
def said(*keys: str) -> str | None:
    """What Linux tells of the first core in the line that begins with one of `keys`; None elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(keys)), None)


def quick_bf16_vectors() -> bool:
    """Whether AVX-512's dot products of bf16 beat fp32: on AMD's cores; Intel's do as many products of fp32 a cycle."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() and said("vendor_id") != "GenuineIntel"


def multiplies_bf16() -> bool:
    """Whether PyTorch's products of bf16 matrices are faster than fp32's. Without instructions for them, they are emulated."""
    return quick_bf16_vectors() or getattr(torch.cpu, "_is_amx_tile_supported", bool)()
