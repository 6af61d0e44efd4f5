"""Running a pruned model: packed checkpoints (packed.py), sparse linears on CPU (cpu.py) and GPU (cuda.py)."""

from typing import Any

from torch import nn

from topiarist.runtime import cpu, cuda
from topiarist.runtime.bench import BenchReport, bench_folder
from topiarist.runtime.cpu import Acceleration
from topiarist.runtime.generate import Generator
from topiarist.runtime.legacy import convert_legacy
from topiarist.runtime.loading import from_packed, load_model
from topiarist.runtime.packed import PackReport, pack_folder, unpack_folder

__all__ = [
    "Acceleration",
    "BenchReport",
    "Generator",
    "PackReport",
    "accelerate",
    "bench_folder",
    "convert_legacy",
    "from_packed",
    "load_model",
    "pack_folder",
    "restore",
    "unpack_folder",
]


def accelerate(model: nn.Module, **options: Any) -> Acceleration:
    """Swap the sparse linears of a model for faster ones, in place: `cuda.accelerate` if the model is on a GPU, else
    `cpu.accelerate`, whose docstrings say what `options` there are.
    """
    on_gpu = any(weight.is_cuda for weight in model.parameters())
    return cuda.accelerate(model, **options) if on_gpu else cpu.accelerate(model, **options)


def restore(model: nn.Module) -> None:
    """Undo `accelerate`, in place."""
    cpu.restore(model)
    cuda.restore(model)
