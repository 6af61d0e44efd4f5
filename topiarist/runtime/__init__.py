"""Running a pruned model: packed checkpoints (packed.py), sparse linears on CPU (cpu.py) and GPU (cuda.py)."""

from topiarist.runtime.cpu import Acceleration, accelerate, restore
from topiarist.runtime.legacy import convert_legacy
from topiarist.runtime.packed import PackReport, from_packed, pack_folder, unpack_folder

__all__ = [
    "Acceleration",
    "PackReport",
    "accelerate",
    "convert_legacy",
    "from_packed",
    "pack_folder",
    "restore",
    "unpack_folder",
]
