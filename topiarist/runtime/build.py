"""The C++ kernels of packed linears, called through ctypes.

The library holds code for every instruction set and picks at run time, so one cached file serves all machines that
share a home folder.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int8, Int64, Integer, Shaped
from torch import Tensor

from topiarist.core.compiled import loaded
from topiarist.runtime.bits import RAW

SOURCE = Path(__file__).parent / "kernels" / "kernels.cpp"
LEVELS = ("plain C++", "AVX2", "AVX-512 VBMI2", "AVX-512 VBMI2 + BF16")
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3}
INTEGERS = {8: 3, 4: 4}
"""By bits a weight."""
FORMS = {"bitmask": 0, "2:4": 1, "full": 2}
"""Codes shared with `Level`, `Type` and `Form` in kernels/common.hpp."""
TILE_ROWS, BLOCK_COLS, INTEGER_COLS = 4, 32, 64
SLACK = 64
"""Elements after the last value that the kernels may read."""

_FLAGS = ("-std=c++17", "-O3", "-fopenmp-simd")


class Weight(ctypes.Structure):
    """A matrix as kernels/common.hpp describes it: sizes and addresses. Whoever makes one keeps the tensors alive."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("form", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("bias_type", ctypes.c_int32),
        ("masks", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Kernels:
    """The loaded library, the best instruction set of this processor, an index of LEVELS, and the digest of the sources."""

    code: ctypes.CDLL
    level: int
    threaded: bool
    digest: str

    def pack(self, weight: Float[Tensor, "rows cols"], threads: int) -> tuple[Tensor, Tensor, Tensor]:
        """(masks int32, values as raw integers, starts int64) of a dense contiguous weight; order as in floats.hpp.

        Values are integers so that `.to(dtype)` of a model leaves them alone.
        """
        rows, cols = weight.shape
        tiles, blocks = -(-rows // TILE_ROWS), -(-cols // BLOCK_COLS)
        masks = torch.empty(tiles * blocks * TILE_ROWS, dtype=torch.int32)
        counts = torch.empty(tiles, dtype=torch.int64)
        kind, dense = TYPES[weight.dtype], weight.data_ptr()
        self.code.topiarist_find_masks(kind, rows, cols, dense, masks.data_ptr(), counts.data_ptr(), threads)
        ends = counts.cumsum(0)
        starts = ends - counts
        values = torch.zeros(int(ends[-1]) + SLACK, dtype=RAW[weight.element_size()])
        self.code.topiarist_gather_values(
            kind, rows, cols, dense, masks.data_ptr(), starts.data_ptr(), values.data_ptr(), threads
        )
        return masks, values, starts

    def pack_integers(
        self, codes: Int8[Tensor, "rows cols"], bits: int, form: str, threads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(masks int64, values uint8, starts int64) of integers; order as in integers.hpp. The form "full" has no masks."""
        rows, cols = codes.shape
        tiles, blocks = -(-rows // TILE_ROWS), -(-cols // INTEGER_COLS)
        masks = torch.empty(0 if form == "full" else tiles * blocks * TILE_ROWS, dtype=torch.int64)
        sizes = torch.empty(tiles, dtype=torch.int64)
        what = (INTEGERS[bits], FORMS[form], rows, cols, codes.data_ptr(), masks.data_ptr())
        self.code.topiarist_find_integer_masks(*what, sizes.data_ptr(), threads)
        ends = sizes.cumsum(0)
        starts = ends - sizes
        values = torch.zeros(int(ends[-1]) + SLACK, dtype=torch.uint8)
        self.code.topiarist_gather_integers(*what, starts.data_ptr(), values.data_ptr(), threads)
        return masks, values, starts

    def multiply(
        self,
        weight: Weight,
        x: Float[Tensor, "batch cols"],
        y: Float[Tensor, "batch rows"],
        threads: int,
        level: int | None = None,
    ) -> None:
        """y = x W^T + bias, x and y contiguous."""
        self.code.topiarist_multiply(
            ctypes.byref(weight), x.data_ptr(), TYPES[x.dtype], x.shape[0], y.data_ptr(), TYPES[y.dtype],
            self.level if level is None else level, threads,
        )  # fmt: skip

    def has_panels(self, weight: Weight) -> bool:
        """Whether `multiply_by_panels` is there, and faster than torch's product of what `expand` writes."""
        return bool(self.code.topiarist_has_panels(ctypes.byref(weight)))

    def multiply_by_panels(
        self, weight: Weight, x: Float[Tensor, "batch cols"], y: Float[Tensor, "batch rows"], threads: int
    ) -> None:
        """y = x W^T + bias, x and y contiguous bf16; the weight is expanded once for all of x."""
        self.code.topiarist_multiply_by_panels(
            ctypes.byref(weight), x.data_ptr(), x.shape[0], y.data_ptr(), threads
        )  # fmt: skip

    def expand(
        self, weight: Weight, tiles: range, out: Shaped[Tensor, "..."], threads: int, level: int | None = None
    ) -> None:
        """Write the dense rows of some tiles of four rows to `out` (rows, cols), contiguous.

        Floats come in the weight's own dtype; integers as code times scale in the dtype of `out`, or as codes in int8.
        """
        self.code.topiarist_expand(
            ctypes.byref(weight), tiles.start, tiles.stop, out.data_ptr(), TYPES[out.dtype],
            self.level if level is None else level, threads,
        )  # fmt: skip

    def rows(self, weight: Weight, indices: Integer[Tensor, " count"], out: Float[Tensor, "count cols"]) -> None:
        """Write some rows of a weight to `out`, fp32 and contiguous. Raises IndexError for rows that it has not."""
        indices = whole_indices(indices, weight.rows)
        self.code.topiarist_rows(ctypes.byref(weight), indices.data_ptr(), indices.numel(), out.data_ptr(), self.level)


def whole_indices(indices: Integer[Tensor, " count"], rows: int) -> Int64[Tensor, " count"]:
    """Indices as the kernels read them, one after the other in 64 bits. Raises IndexError for rows that are not there.

    The kernels themselves look at nothing: they would read whatever memory lies there.
    """
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < rows:
        raise IndexError(f"index out of range: {int(indices.min())} to {int(indices.max())} in a table of {rows} rows")
    return indices.to(torch.int64).contiguous()


@functools.cache
def load_kernels() -> Kernels:
    """Compile if need be, and load. Raises NoKernels with the reason and the cure."""
    # The compiled library is known by its main source and the flags, so the digest of the headers is one of them.
    sources = b"".join(path.read_bytes() for path in sorted(SOURCE.parent.glob("*.?pp")))
    digest = hashlib.sha256(sources).hexdigest()[:16]
    library, threaded = loaded(SOURCE, (*_FLAGS, f"-DTOPIARIST_SOURCES=0x{digest}"))
    _declare(library)
    return Kernels(library, level=library.topiarist_level(), threaded=threaded, digest=digest)


def _declare(library: ctypes.CDLL) -> None:
    whole, long, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    arguments = {
        "find_masks": [whole, long, long, pointer, pointer, pointer, whole],
        "gather_values": [whole, long, long, pointer, pointer, pointer, pointer, whole],
        "find_integer_masks": [whole, whole, long, long, pointer, pointer, pointer, whole],
        "gather_integers": [whole, whole, long, long, pointer, pointer, pointer, pointer, whole],
        "multiply": [pointer, pointer, whole, long, pointer, whole, whole, whole],
        "multiply_by_panels": [pointer, pointer, long, pointer, whole],
        "expand": [pointer, long, long, pointer, whole, whole, whole],
        "rows": [pointer, pointer, long, pointer, whole],
        "step": [pointer, pointer, long, long, pointer, pointer],
    }
    for name, types in arguments.items():
        function = getattr(library, f"topiarist_{name}")
        function.argtypes, function.restype = types, None
    library.topiarist_level.restype = whole
    library.topiarist_has_panels.argtypes, library.topiarist_has_panels.restype = [pointer], whole
    library.topiarist_workspace_size.argtypes = [pointer, long]
    library.topiarist_workspace_size.restype = long
