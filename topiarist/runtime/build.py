"""The C++ kernels of sparse linears, called through ctypes.

The library holds code for every instruction set and picks at run time, so one cached file serves all machines that
share a home folder.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from topiarist.core.compiled import loaded
from topiarist.runtime.bits import RAW

SOURCE = Path(__file__).with_name("kernels.cpp")
LEVELS = ("plain C++", "AVX2", "AVX-512 VBMI2", "AVX-512 VBMI2 + BF16")
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""Codes shared with `Level` and `Type` in kernels.cpp."""
TILE_ROWS, BLOCK_COLS = 4, 32
SLACK = 64
"""Elements after the last value that the kernels may read."""

_FLAGS = ("-std=c++17", "-O3")


@dataclass(frozen=True)
class Kernels:
    """The loaded library and the best instruction set of this processor, an index of LEVELS."""

    code: ctypes.CDLL
    level: int
    threaded: bool

    def pack(self, type_code: int, weight: Tensor, threads: int) -> tuple[Tensor, Tensor, Tensor]:
        """(masks int32, values as raw integers, starts int64) of a dense contiguous weight; order as in kernels.cpp.

        Values are integers so that `.to(dtype)` of a model leaves them alone.
        """
        rows, cols = weight.shape
        tiles, blocks = -(-rows // TILE_ROWS), -(-cols // BLOCK_COLS)
        masks = torch.empty(tiles * blocks * TILE_ROWS, dtype=torch.int32)
        counts = torch.empty(tiles, dtype=torch.int64)
        dense, library = weight.data_ptr(), self.code
        library.topiarist_find_masks(type_code, rows, cols, dense, masks.data_ptr(), counts.data_ptr(), threads)
        ends = counts.cumsum(0)
        starts = ends - counts
        values = torch.zeros(int(ends[-1]) + SLACK, dtype=RAW[weight.element_size()])
        library.topiarist_gather_values(
            type_code, rows, cols, dense, masks.data_ptr(), starts.data_ptr(), values.data_ptr(), threads
        )
        return masks, values, starts

    def multiply(
        self, type_code: int, rows: int, cols: int, masks: Tensor, values: Tensor, starts: Tensor,
        x: Tensor, bias: Tensor | None, y: Tensor, threads: int, level: int | None = None,
    ) -> None:  # fmt: skip
        """y (batch, rows) = x (batch, cols) W^T + bias. All contiguous, x and y and bias of W's type."""
        self.code.topiarist_multiply(
            self.level if level is None else level, type_code, rows, cols, masks.data_ptr(), values.data_ptr(),
            starts.data_ptr(), x.data_ptr(), x.shape[0], None if bias is None else bias.data_ptr(), y.data_ptr(),
            threads,
        )  # fmt: skip

    def expand(
        self, type_code: int, rows: int, cols: int, masks: Tensor, values: Tensor, starts: Tensor,
        tiles: range, out: Tensor, threads: int, level: int | None = None,
    ) -> None:  # fmt: skip
        """Write the dense rows of some tiles of four rows to `out` (rows, cols), contiguous."""
        self.code.topiarist_expand(
            self.level if level is None else level, type_code, rows, cols, masks.data_ptr(), values.data_ptr(),
            starts.data_ptr(), tiles.start, tiles.stop, out.data_ptr(), threads,
        )  # fmt: skip


@functools.cache
def load_kernels() -> Kernels:
    """Compile if need be, and load. Raises NoKernels with the reason and the cure."""
    library, threaded = loaded(SOURCE, _FLAGS)
    _declare(library)
    return Kernels(library, level=library.topiarist_level(), threaded=threaded)


def _declare(library: ctypes.CDLL) -> None:
    whole, long, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    matrix = [whole, whole, long, long, pointer, pointer, pointer]
    library.topiarist_level.restype = whole
    library.topiarist_find_masks.argtypes = [whole, long, long, pointer, pointer, pointer, whole]
    library.topiarist_find_masks.restype = None
    library.topiarist_gather_values.argtypes = [whole, long, long, pointer, pointer, pointer, pointer, whole]
    library.topiarist_gather_values.restype = None
    library.topiarist_multiply.argtypes = [*matrix, pointer, long, pointer, pointer, whole]
    library.topiarist_multiply.restype = None
    library.topiarist_expand.argtypes = [*matrix, long, long, pointer, whole]
    library.topiarist_expand.restype = None
