"""2:4 on the GPU: `torch.sparse.to_sparse_semi_structured` for the linears it fits, where it was measured to be faster.

Tensor cores skip the zeros of a 2:4 weight, at best 2 x in large products; in small ones only the bytes shrink, to
9/16. Attention's smaller matrices often lose (a bf16 ViT-H on an A100: 1.10 x with the MLPs alone, 1.07 x with attention
too), so only MLPs are tried unless asked otherwise. Unstructured zeros gain nothing here and stay dense.

What fits is decided by plain functions of shapes and dtypes; only `_compress` and `_race` call the GPU.
"""

from __future__ import annotations

import re
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from topiarist.core.patterns import NM
from topiarist.runtime.bits import describe
from topiarist.runtime.cpu import MARGIN, Acceleration, Layer

MULTIPLES = {
    "cusparselt": {torch.bfloat16: (16, 16), torch.float16: (16, 16)},
    "cutlass": {torch.bfloat16: (32, 64), torch.float16: (32, 64)},
}
"""By torch's backend: (out, in) must be multiples of these. Its other dtypes are not those of a linear's inputs."""
CAPABILITY = (8, 0)
"""Ampere, the first with sparse tensor cores."""
MLP = re.compile(
    r"(^|\.)(mlp|feed_forward|ffn|block_sparse_moe|fc1|fc2|fc_in|fc_out|dense_h_to_4h|dense_4h_to_h)(\.|$)"
)
ROUNDS = 30
FLUSH_BYTES = 256 << 20  # written between timings: more than any GPU's L2


class SemiStructuredLinear(nn.Module):
    """y = x W^T + b with a 2:4 weight in torch's semi-structured form (2 of 4 values and 2-bit positions)."""

    compressed: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("compressed", _compress(linear.weight.detach().contiguous()), persistent=False)
        self.bias = linear.bias
        self.training = False

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The dense weight, made anew at each call."""
        return self.compressed.to_dense()

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x W^T + b by torch's semi-structured product."""
        return F.linear(x, self.compressed, self.bias)

    def to_linear(self) -> nn.Linear:
        """The ordinary layer again."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = self.bias  # pyright: ignore[reportAttributeAccessIssue]
        return linear

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)


def accelerate(
    model: nn.Module, *, tokens: Sequence[int] = (1, 256), layers: Literal["mlp", "all"] = "mlp", measure: bool = True
) -> Acceleration:
    """Swap the 2:4 linears of a model on the GPU for semi-structured ones, in place.

    `tokens`: how many go through a layer at once in your use (the batch while decoding, batch times length in a
    prefill). A shape is swapped if it loses at none of them and gains at one. `layers="all"` tries attention as well.
    """
    obstacle = device_obstacle()
    if obstacle:
        warnings.warn(f"2:4 layers run as dense ones: {obstacle}", stacklevel=2)
    uses = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    found: dict[str, Layer] = {}
    alike: dict[tuple, list[str]] = {}
    for name, module in model.named_modules():
        if name and type(module) is nn.Linear:
            shared = uses[id(module.weight)] > 1
            reason = obstacle or linear_obstacle(name, module, layers=layers, backend=backend(), shared=shared)
            shape = (module.out_features, module.in_features)
            mask = module.weight != 0
            sparsity = 1 - float(mask.float().mean())
            found[name] = Layer(name, shape, describe(mask), sparsity, not reason, reason, module.weight.nbytes)
            if not reason:
                alike.setdefault((shape, module.weight.dtype, module.bias is None), []).append(name)
    for names in alike.values():
        pays, reason, first = True, "not measured", (None, None)
        if measure:
            linear: nn.Linear = model.get_submodule(names[0])  # pyright: ignore[reportAssignmentType]
            times = [_race(linear, SemiStructuredLinear(linear), count) for count in tokens]
            pays, reason = choose(tokens, times)
            first = times[0]
        for name in names:
            module = model.get_submodule(name)
            if pays:
                model.set_submodule(name, SemiStructuredLinear(module))  # pyright: ignore[reportArgumentType]
            found[name] = replace(
                found[name],
                packed=pays,
                reason=reason,
                packed_bytes=found[name].dense_bytes * 9 // 16,
                dense_ms=first[0],
                packed_ms=first[1],
            )
    return Acceleration(tuple(found.values()), f"torch semi-structured, {backend()}", 0)


def restore(model: nn.Module) -> None:
    """Turn every semi-structured linear back into an ordinary one, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SemiStructuredLinear):
            model.set_submodule(name, module.to_linear())


def backend() -> str:
    """The library torch would use for semi-structured products."""
    forced = torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS
    return "cutlass" if forced or not torch.backends.cusparselt.is_available() else "cusparselt"


def device_obstacle() -> str:
    """Why this machine has no use for 2:4; empty if it has."""
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    if torch.version.hip is None and torch.cuda.get_device_capability() < CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        return f"{name} has compute capability {major}.{minor}, sparse tensor cores begin at 8.0"
    return ""


def linear_obstacle(name: str, linear: nn.Linear, *, layers: str, backend: str, shared: bool = False) -> str:
    """Why a linear cannot run, or is not to be tried, in semi-structured form; empty if it can."""
    weight = linear.weight
    if layers == "mlp" and not MLP.search(name):
        return "not in an MLP (layers='all' tries it)"
    if weight.dtype not in MULTIPLES[backend]:
        return f"{backend} has no 2:4 product for {weight.dtype}".replace("torch.", "")
    rows, cols = MULTIPLES[backend][weight.dtype]
    if weight.shape[0] % rows or weight.shape[1] % cols:
        return f"shape {tuple(weight.shape)} is not a multiple of ({rows}, {cols}), which {backend} needs"
    if shared:
        return "its weight is shared with another module"
    if not NM(2, 4).holds(weight != 0):
        return "not 2:4"
    return ""


def choose(tokens: Sequence[int], times: Sequence[tuple[float, float]]) -> tuple[bool, str]:
    """Whether a shape pays, and why, from (dense, sparse) milliseconds at each number of tokens."""
    for count, (dense, sparse) in zip(tokens, times, strict=True):
        if sparse > MARGIN * dense:
            return False, f"dense is faster at {count} tokens: {dense:.3g} ms against {sparse:.3g} ms"
    best, count = max((dense / sparse, count) for count, (dense, sparse) in zip(tokens, times, strict=True))
    if best < MARGIN:
        return False, f"no faster than dense at {', '.join(map(str, tokens))} tokens"
    return True, f"{best:.2f} x at {count} tokens"


def _compress(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype.*", category=UserWarning)
        return torch.sparse.to_sparse_semi_structured(weight)


@torch.inference_mode()
def _race(dense: nn.Module, sparse: SemiStructuredLinear, tokens: int) -> tuple[float, float]:
    """Median GPU milliseconds of (dense, sparse), in turns, L2 emptied before every call."""
    device, dtype = sparse.compressed.device, sparse.compressed.dtype
    x = torch.randn(tokens, sparse.in_features, device=device).to(dtype)
    return race([lambda: dense(x), lambda: sparse(x)], device)  # pyright: ignore[reportReturnType]


def race(calls: Sequence[Callable[[], object]], device: torch.device) -> tuple[float, ...]:
    """Median GPU milliseconds of each call, in turns, L2 emptied before every call."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    for call in calls:  # the first call picks its algorithm
        for _ in range(3):
            call()
    events = []
    for _ in range(ROUNDS):
        for call in calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            call()
            end.record()
            events.append((start, end))
    torch.cuda.synchronize(device)
    times = [start.elapsed_time(end) for start, end in events]
    return tuple(statistics.median(times[i :: len(calls)]) for i in range(len(calls)))
