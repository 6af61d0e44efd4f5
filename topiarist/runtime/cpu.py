"""`accelerate(model)`: run a pruned model on the CPU with packed linears, where they were measured to be faster.

Decoding one token reads every weight once, so reading fewer bytes is the speed: 1.78 x for 2:4 in bf16 and 2.76 x for
70 % zeros, if the dense layer is bound by memory too. Whether a layer gains is not assumed: every distinct shape is
timed when the model is loaded, on this machine, with the threads that torch has now. What does not gain at every batch
up to 4 stays dense, and the report says so.
"""

from __future__ import annotations

import platform
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from topiarist.core.compiled import NoKernels
from topiarist.core.processor import said
from topiarist.core.products import quick_products
from topiarist.runtime.bits import describe
from topiarist.runtime.build import LEVELS, TYPES, load_kernels
from topiarist.runtime.limits import Limits
from topiarist.runtime.linear import PackedLinear, QuantisedLinear

MIN_SPARSITY = 0.25
SMALL_BATCHES = (1, 2, 4)
"""Batches at which a packed layer may not be slower than its dense one."""
LARGE_BATCHES = (8, 16, 32)
MARGIN = 1.03
"""A gain smaller than the noise is none."""
COLD_BYTES = 64 << 20
"""Weights of one shape that together outgrow the caches; fewer are pushed out between timings."""
SECONDS = 0.2
"""Timing spent on one shape at one batch."""


@dataclass(frozen=True)
class Layer:
    """One linear: what it runs as, and why. Bytes are of the weight in memory; milliseconds of the smallest batch timed.

    `sparsity` is the fraction of zeros, `packed` whether it runs sparse, `max_batch` the most tokens that its kernel
    takes before another way is faster.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    packed: bool
    reason: str
    dense_bytes: int
    packed_bytes: int = 0
    max_batch: int = 0
    dense_ms: float | None = None
    packed_ms: float | None = None


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did, layer by layer."""

    layers: tuple[Layer, ...]
    instruction_set: str
    threads: int

    @property
    def num_packed(self) -> int:
        """Layers that run packed."""
        return sum(layer.packed for layer in self.layers)

    @property
    def bytes_before(self) -> int:
        """Bytes of all layers' dense weights."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all layers' weights as they now run, packed or dense."""
        return sum(layer.packed_bytes if layer.packed else layer.dense_bytes for layer in self.layers)


@dataclass(frozen=True)
class Verdict:
    """Whether layers of one shape are worth packing, and up to how many tokens their kernel is the faster way."""

    packed: bool
    reason: str
    max_batch: int = max(SMALL_BATCHES)
    dense_ms: float | None = None
    packed_ms: float | None = None


def accelerate(model: nn.Module, *, keep_dense: bool = False, measure: bool = True) -> Acceleration:
    """Swap the linears of a pruned model for packed ones, in place. Outputs are equal to the rounding of the dtype.

    `keep_dense` keeps the dense weights for batches at which they are faster (prefill), at the price of memory.
    Layers of integers, which are packed already, are told up to how many tokens their kernel is the faster way.
    `measure=False` packs every eligible layer without timing it. Without a compiler or a fitting processor nothing is
    swapped and a warning says why. `restore` undoes it all; a state dict holds the dense weights at any time.
    """
    instruction_set, missing = _instruction_set()
    if missing:
        warnings.warn(f"sparse layers run as dense ones: {missing}", stacklevel=2)
    uses = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    layers: dict[str, Layer] = {}
    alike: dict[tuple, list[str]] = {}
    for name, module in model.named_modules():
        if name and type(module) is nn.Linear:
            mask = module.weight != 0
            sparsity = 1 - float(mask.float().mean())
            obstacle = missing or _obstacle(module, sparsity, shared=uses[id(module.weight)] > 1)
            shape = (module.out_features, module.in_features)
            layers[name] = Layer(name, shape, describe(mask), sparsity, not obstacle, obstacle, module.weight.nbytes)
            if not obstacle:
                alike.setdefault((shape, module.weight.dtype, round(sparsity, 1)), []).append(name)
        elif isinstance(module, QuantisedLinear):
            layers[name] = _integers(name, module, measure)
    for names in alike.values():  # only one group's weights are in memory twice
        layers |= _swap(model, [layers[name] for name in names], keep_dense, measure)
    return Acceleration(tuple(layers.values()), instruction_set, torch.get_num_threads())


def restore(model: nn.Module) -> None:
    """Turn every packed linear back into an ordinary one, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            model.set_submodule(name, module.to_linear())


def _instruction_set() -> tuple[str, str]:
    """(the kernels' instruction set, what is missing to use them)."""
    try:
        level = load_kernels().level
    except NoKernels as error:
        return "none", str(error)
    return LEVELS[level], "" if level else "this processor has neither AVX2 nor AVX-512 with VBMI2"


def _obstacle(linear: nn.Linear, sparsity: float, *, shared: bool) -> str:
    """Why a linear cannot run packed; empty if it can."""
    if not linear.weight.numel():
        return "empty"
    if linear.weight.device.type != "cpu":
        return f"its weight is on {linear.weight.device}"
    if linear.weight.dtype not in TYPES:
        return f"no kernel for {linear.weight.dtype}".replace("torch.", "")
    if linear.bias is not None and linear.bias.dtype != linear.weight.dtype:
        return "its bias has another dtype than its weight"
    if shared:
        return "its weight is shared with another module"
    if sparsity < MIN_SPARSITY:
        return f"only {sparsity:.0%} zeros" if sparsity >= 0.005 else "not pruned"
    return ""


def _swap(model: nn.Module, layers: Sequence[Layer], keep_dense: bool, measure: bool) -> dict[str, Layer]:
    dense = [model.get_submodule(layer.name) for layer in layers]
    packed = [PackedLinear(linear, keep_dense=keep_dense) for linear in dense]  # pyright: ignore[reportArgumentType]
    verdict = judge(dense, packed, keep_dense=keep_dense) if measure else Verdict(True, "not measured")
    done = {}
    for layer, module in zip(layers, packed, strict=True):
        module.max_batch = verdict.max_batch
        if verdict.packed:
            model.set_submodule(layer.name, module)
        done[layer.name] = replace(
            layer,
            packed=verdict.packed,
            reason=verdict.reason,
            packed_bytes=module.packed_bytes + (layer.dense_bytes if keep_dense else 0),
            max_batch=verdict.max_batch if verdict.packed else 0,
            dense_ms=verdict.dense_ms,
            packed_ms=verdict.packed_ms,
        )
    return done


def _integers(name: str, linear: QuantisedLinear, measure: bool) -> Layer:
    """A layer of integers, with its kernel's limit set."""
    mask = linear.codes != 0
    shape, pattern = (linear.out_features, linear.in_features), describe(mask)
    if measure:
        kind = (shape, linear.bits, linear.form, linear.dtype)
        linear.max_batch = _limits.of(kind, processor(), lambda: limit_of(linear))
    dense_bytes = mask.numel() * linear.dtype.itemsize
    sparsity = 1 - float(mask.float().mean())
    reason = f"{linear.bits}-bit integers"
    return Layer(name, shape, pattern, sparsity, True, reason, dense_bytes, linear.packed_bytes, linear.max_batch)


_limits = Limits()
"""Most tokens that the kernel of layers of one kind takes."""


@torch.inference_mode()
def limit_of(linear: PackedLinear) -> int:
    """The most tokens at which a layer's kernel was no slower than its panels, timed in turns; at least 1."""
    most = 1
    for batch in (*SMALL_BATCHES[1:], *LARGE_BATCHES):
        x = torch.randn(batch, linear.in_features).to(linear.dtype)
        kernel, panels = race([[_call(linear.multiply, x), _call(linear.multiply_by_panels, x)]], seconds=SECONDS / 10)
        if kernel > panels:
            break
        most = batch
    return most


@torch.inference_mode()
def judge(dense: Sequence[nn.Module], packed: Sequence[PackedLinear], *, keep_dense: bool) -> Verdict:
    """Time dense layers of one shape against their packed forms, taking turns, in the order a model runs them.

    Dense ones run as `evaluated` runs them: against a product that the processor emulates, everything would be a gain.
    """
    width, dtype = packed[0].in_features, packed[0].dtype
    total = sum(layer.packed_bytes for layer in packed)
    cold = torch.zeros(COLD_BYTES // 4) if total < COLD_BYTES else None
    first: tuple[float, float] | None = None
    most = 0
    for batch in SMALL_BATCHES:
        x = torch.randn(batch, width).to(dtype)
        dense_ms, packed_ms = race(
            [[_quick(d, x), _call(p.multiply, x)] for d, p in zip(dense, packed, strict=True)], cold
        )
        first = first or (dense_ms, packed_ms)
        if dense_ms < MARGIN * packed_ms:
            lost = f"dense is faster at batch {batch}: {dense_ms:.3g} ms against {packed_ms:.3g} ms"
            if most and keep_dense:
                return Verdict(True, f"{lost}; packed up to batch {most}", most, *first)
            return Verdict(False, lost, 0, *first)
        most = batch
    for batch in LARGE_BATCHES:
        x = torch.randn(batch, width).to(dtype)
        pairs = zip(dense, packed, strict=True)
        rivals = [
            [_quick(d, x) if keep_dense else _call(p.multiply_by_panels, x), _call(p.multiply, x)] for d, p in pairs
        ]
        other_ms, packed_ms = race(rivals, cold)
        if other_ms < packed_ms:
            break
        most = batch
    return Verdict(True, "faster than dense", most, *(first or (None, None)))


def processor() -> str:
    """The processor's own name."""
    return said("model name") or platform.processor() or platform.machine()


def clock() -> float:
    """Seconds. With one thread the time of that thread alone: on a shared machine the wall's would favour short calls,
    which are seldom interrupted, over long ones.
    """
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def race(
    rivals: Sequence[Sequence[Callable[[], object]]],
    cold: Shaped[Tensor, "..."] | None = None,
    *,
    seconds: float = SECONDS,
) -> list[float]:
    """Median milliseconds of each column of `rivals`: rows in turn, and columns in turn within each row.

    Noise of the machine then falls on all alike. `cold` is read before each call to empty the caches.
    """
    times: list[list[float]] = [[] for _ in rivals[0]]
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for row in rivals:
            for column, call in enumerate(row):
                if cold is not None:
                    cold.sum()
                start = clock()
                call()
                times[column].append(1e3 * (clock() - start))
            if len(times[0]) >= 3 and time.perf_counter() > end:
                break
    return [statistics.median(column) for column in times]


def _call(function: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    return lambda: function(x)


def _quick(linear: nn.Module, x: Tensor) -> Callable[[], object]:
    """A dense layer's product; a single token needs no help, and entering the mode takes a part of its time."""
    return _call(linear if len(x) == 1 else quick_products()(linear.forward), x)
