"""16-bit matrix products on processors that multiply fp32 faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from topiarist.core import linalg

_OPERAND: dict[Callable[..., Any], int] = {F.linear: 0, torch.einsum: -1, Tensor.__matmul__: 0} | {
    getattr(owner, name): int(name in ("addmm", "baddbmm"))
    for owner in (torch, Tensor)
    for name in ("matmul", "mm", "bmm", "addmm", "baddbmm")
}
"""The products, and which argument's rows are multiplied: the first of addmm is what is added, a bias perhaps."""
_SLICE = 1 << 26
"""Weights of a linear that are cast at once: an output layer of a large vocabulary is not copied whole."""


@contextmanager
def quick_products() -> Iterator[None]:
    """Let 16-bit matrix products on the CPU run in fp32 inside, where the processor is faster so.

    Without instructions for them PyTorch emulates them, five times slower. Each result is rounded to the dtype that it
    would have anyway, and sums are fp32 either way: what changes is their order. Weights and activations stay in 16 bits.
    """
    if linalg.search_dtype(torch.device("cpu")) == torch.float32:
        with _InFloat32():
            yield
    else:
        yield


class _InFloat32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = _OPERAND.get(func, len(args))
        if place >= len(args) or not _is_slow(args[place]):  # operands given by name are left to torch
            return func(*args, **kwargs)
        if func is F.linear:
            return _linear(*args, **kwargs)
        return _in_float32(func, *args, **kwargs)


def _is_slow(operand: Any) -> bool:
    """A single row is quick enough, and a cast of the whole weight is not."""
    while isinstance(operand, list | tuple):  # einsum takes a list as well
        operand = operand[-1]
    return (
        isinstance(operand, Tensor)
        and operand.dtype in (torch.bfloat16, torch.float16)
        and operand.device.type == "cpu"
        and operand.numel() > operand.shape[-1]
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = max(_SLICE // weight.shape[1], 1)
    if weight.shape[0] <= rows:
        return _in_float32(F.linear, x, weight, bias)
    biases = [None] * -(-weight.shape[0] // rows) if bias is None else list(bias.split(rows))
    parts = [_in_float32(F.linear, x, w, b) for w, b in zip(weight.split(rows), biases, strict=True)]
    return torch.cat(parts, dim=-1)


def _in_float32(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    pairs: list[tuple[Tensor, Tensor]] = []

    def cast(tensor: Tensor) -> Tensor:
        if tensor.dtype not in (torch.bfloat16, torch.float16):
            return tensor
        pairs.append((tensor, tensor.float()))
        return pairs[-1][1]

    def keep(kept: Tensor) -> tuple[Tensor, int]:
        """What autograd would keep without us: the operand itself, and no copy of a weight. And its version."""
        for own, wide in pairs:
            if kept.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr() and own.stride() == wide.stride():
                view = own.detach().as_strided(kept.shape, kept.stride(), own.storage_offset() + kept.storage_offset())
                return view, view._version
        copied = kept.to(pairs[0][0].dtype)
        return copied, copied._version

    args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
    with torch.autograd.graph.saved_tensors_hooks(keep, _unchanged):
        found = func(*args, **kwargs)
    dtype = pairs[0][0].dtype
    pairs.clear()  # the graph holds `keep` for as long as it holds what was kept
    return found.to(dtype)


def _unchanged(kept: tuple[Tensor, int]) -> Tensor:
    """What was kept, in fp32. Raises RuntimeError if it was changed in place since, as autograd itself would."""
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError("an operand of a matrix product was changed in place before its backward pass")
    return tensor.float()
