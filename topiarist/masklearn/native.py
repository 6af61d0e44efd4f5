"""The C++ path of the mask arithmetic: compiled at first use with the system's compiler, called through ctypes.

About ten times faster than plain torch on a CPU. Without a compiler everything works, slowly: one warning says so.
Threads are plain Python ones (ctypes releases the GIL and rows are independent), so no second OpenMP runtime is loaded
beside torch's.
"""

from __future__ import annotations

import ctypes
import platform
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from topiarist.core.compiled import NoKernels, compiled
from topiarist.core.processor import said
from topiarist.masklearn.noise import Key

SOURCE = Path(__file__).with_suffix(".cpp")
# No -ffast-math: NaN must stay NaN so that a diverged run is noticed, and sums must not be reordered between machines.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++17")
MIN_ROWS = 16  # per thread


class Mask(ctypes.Structure):
    """Kept in step with `struct Mask` in native.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "groups", "of", "classes")),
        *((name, ctypes.c_void_p) for name in ("table", "weight", "logits")),
        *((name, ctypes.c_int32) for name in ("weight_bf16", "logits_bf16")),
        *((name, ctypes.c_float) for name in ("kappa", "tau", "lam")),
        *((name, ctypes.c_uint32) for name in ("key0", "key1")),
        *((name, ctypes.c_int32) for name in ("first_row", "first_group", "noise", "hard", "kind", "keep")),
        ("push", ctypes.c_float),
    ]


class Adam(ctypes.Structure):
    """Kept in step with `struct Adam` in native.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad_effective", "m", "v")),
        *((name, ctypes.c_int32) for name in ("grad_bf16", "moments_bf16", "share")),
        *(
            (name, ctypes.c_float)
            for name in ("lr", "beta1", "beta2", "eps", "decay", "correction1", "correction2", "scale")
        ),
        *((name, ctypes.c_uint32) for name in ("key0", "key1", "key2", "key3")),
    ]


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """The compiled kernels; None, after one warning, where none can be had."""
    try:
        return _load(compiled(SOURCE, FLAGS, machine=_cpu()))
    except (OSError, NoKernels) as error:
        warnings.warn(
            f"learned masks use plain torch, with the same numbers but about ten times slower: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _cpu() -> str:
    """What -march=native depends on: a cache on a shared home must not serve another machine's instructions."""
    return platform.machine() + (said("flags", "Features") or platform.processor())


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.topiarist_abi.restype = ctypes.c_int64
    if loaded.topiarist_abi() != ctypes.sizeof(Mask) * 1000 + ctypes.sizeof(Adam):
        raise OSError(f"{path} does not match native.py; delete it")
    rows = [ctypes.c_int64, ctypes.c_int64]
    mask, adam, pointer = ctypes.POINTER(Mask), ctypes.POINTER(Adam), ctypes.c_void_p
    loaded.topiarist_forward.argtypes = [mask, pointer, pointer, *rows]
    loaded.topiarist_backward.argtypes = [mask, adam, pointer, pointer, *rows]
    loaded.topiarist_forward.restype = loaded.topiarist_backward.restype = None
    return loaded


def usable(*tensors: Shaped[Tensor, "..."]) -> bool:
    """Whether the kernels take these tensors: contiguous, on the CPU, fp32 or bf16; and a compiler was found."""
    dtypes = (torch.float32, torch.bfloat16)
    fits = all(t.device.type == "cpu" and t.dtype in dtypes and t.is_contiguous() for t in tensors)
    return fits and load() is not None


def mask_args(
    weight: Float[Tensor, "out in"],
    logits: Float[Tensor, "out classes groups"],
    table: Bool[Tensor, "..."],
    *,
    kappa: float,
    tau: float,
    lam: float,
    key: Key,
    first_row: int,
    first_group: int,
    noise: bool,
    hard: bool,
    kind: int = 0,
    keep: int = 0,
) -> Mask:
    """The structure for a weight (out, in), logits (out, classes, groups) and a bool table (classes, of).

    kind: Categorical (0), TopN (1), Bernoulli (2); only the first reads the table.
    """
    rows, classes, groups = logits.shape
    arguments = Mask(
        rows, groups, weight.shape[1] // groups, classes, table.data_ptr(), weight.data_ptr(), logits.data_ptr(),
        weight.dtype == torch.bfloat16, logits.dtype == torch.bfloat16, kappa, tau, lam,
        key[0] & 0xFFFFFFFF, key[1] & 0xFFFFFFFF, first_row, first_group, noise, hard, kind, keep, 0.0,
    )  # fmt: skip
    arguments.keep_alive = (table, weight, logits)  # the structure holds bare addresses
    return arguments


def forward(mask: Mask, out: Float[Tensor, "out in"] | None) -> float:
    """Fill `out` with W * M, if given. The mean largest probability of a group (Categorical), or mean M (Bernoulli)."""
    target = out.data_ptr() if out is not None else None
    return sum(_rows("topiarist_forward", mask, target)) / (mask.rows * mask.groups)


def backward(
    mask: Mask, adam: Adam, out: Float[Tensor, "out classes groups"] | None = None, *, squares: bool = False
) -> float:
    """Gradient into `out`, and / or a step of Adam (see native.cpp). Returns its squared norm if asked for."""
    target = out.data_ptr() if out is not None else None
    return sum(_rows("topiarist_backward", mask, adam, target, squares=squares))


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="topiarist-masks")


def _rows(name: str, mask: Mask, *args, squares: bool = True) -> list[float]:
    """Call a kernel on all rows, split over torch's number of threads; one double comes back from each thread."""
    function = getattr(load(), name)
    structures = [ctypes.byref(arg) if isinstance(arg, ctypes.Structure) else arg for arg in (mask, *args)]
    threads = max(1, min(torch.get_num_threads(), mask.rows // MIN_ROWS))
    bounds = [mask.rows * i // threads for i in range(threads + 1)]

    def part(i: int) -> float:
        result = ctypes.c_double(0.0)
        function(*structures, ctypes.addressof(result) if squares else None, bounds[i], bounds[i + 1])
        return result.value

    return [part(0)] if threads == 1 else list(_pool(threads).map(part, range(threads)))
