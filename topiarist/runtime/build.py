"""The C++ kernels: compiled once with the system's compiler, cached, loaded; or a sentence that says why not.

The library holds code for every instruction set and picks at run time, so one cached file serves all machines that
share a home folder. Folder: $TOPIARIST_CACHE, else $XDG_CACHE_HOME/topiarist, else ~/.cache/topiarist.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from topiarist.errors import TopiaristError
from topiarist.runtime.bits import RAW

SOURCE = Path(__file__).with_name("kernels.cpp")
LEVELS = ("plain C++", "AVX2", "AVX-512 VBMI2", "AVX-512 VBMI2 + BF16")
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""Codes shared with `Level` and `Type` in kernels.cpp."""
TILE_ROWS, BLOCK_COLS = 4, 32
SLACK = 64
"""Elements after the last value that the kernels may read."""

_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-c")
_TIMEOUT = 300  # seconds for one compilation, which takes about five


class NoKernels(TopiaristError, RuntimeError):
    """The kernels cannot be had on this machine; the model still runs, with torch's dense linears."""


@dataclass(frozen=True)
class Kernels:
    """The loaded library and the best instruction set of this processor, an index of LEVELS."""

    library: ctypes.CDLL
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
        dense, library = weight.data_ptr(), self.library
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
        self.library.topiarist_multiply(
            self.level if level is None else level, type_code, rows, cols, masks.data_ptr(), values.data_ptr(),
            starts.data_ptr(), x.data_ptr(), x.shape[0], None if bias is None else bias.data_ptr(), y.data_ptr(),
            threads,
        )  # fmt: skip

    def expand(
        self, type_code: int, rows: int, cols: int, masks: Tensor, values: Tensor, starts: Tensor,
        tiles: range, out: Tensor, threads: int, level: int | None = None,
    ) -> None:  # fmt: skip
        """Write the dense rows of some tiles of four rows to `out` (rows, cols), contiguous."""
        self.library.topiarist_expand(
            self.level if level is None else level, type_code, rows, cols, masks.data_ptr(), values.data_ptr(),
            starts.data_ptr(), tiles.start, tiles.stop, out.data_ptr(), threads,
        )  # fmt: skip


@functools.cache
def load_kernels() -> Kernels:
    """Compile if need be, and load. Raises NoKernels with the reason and the cure."""
    if os.environ.get("TOPIARIST_NO_KERNELS"):
        raise NoKernels("TOPIARIST_NO_KERNELS is set")
    compiler = find_compiler()
    problems = []
    # OpenMP comes from the library that torch has loaded already; where that one lacks GNU's entry points, one thread.
    for openmp in (True, False):
        try:
            library = ctypes.CDLL(str(_compiled(compiler, (*_FLAGS, "-fopenmp") if openmp else _FLAGS)))
        except OSError as error:
            problems.append(str(error))
            continue
        _declare(library)
        return Kernels(library, level=library.topiarist_level(), threaded=openmp)
    raise NoKernels(f"the compiled kernels cannot be loaded: {'; '.join(problems)}")


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX, g++, c++ or clang++."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise NoKernels(f"$CXX names {command[0]!r}, which is not installed")
        return command
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise NoKernels("no C++ compiler found; install g++ (or set $CXX) to run sparse layers faster than dense ones")


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if os.environ.get("TOPIARIST_CACHE"):
        return Path(os.environ["TOPIARIST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topiarist"


def _compiled(compiler: list[str], flags: tuple[str, ...]) -> Path:
    """The shared library, from the cache or newly built; safe when several processes start at once."""
    version = _run([*compiler, "--version"]).splitlines()[:1]
    key = hashlib.sha256(repr((SOURCE.read_text(), compiler, version, flags, platform.machine())).encode())
    folder = cache_folder()
    library = folder / f"kernels-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            object_file, built = Path(work) / "kernels.o", Path(work) / "kernels.so"
            _run([*compiler, *flags, str(SOURCE), "-o", str(object_file)])
            # Linked without -fopenmp, so that no second OpenMP runtime with its own threads is loaded.
            _run([*compiler, "-shared", str(object_file), "-o", str(built)])
            os.replace(built, library)
    except OSError as error:
        raise NoKernels(
            f"cannot write to {folder} ({error.strerror}); set $TOPIARIST_CACHE to a writable folder"
        ) from None
    return library


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"{shlex.join(command)} failed: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise NoKernels(f"{shlex.join(command)} failed: {lines[0]}")
    return done.stdout


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
