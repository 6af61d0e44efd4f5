"""Other processors on this one: products in fp32 whose last bits differ, searches in bf16 as where that is fast.

A test must pass whatever the instruction set: `pytest --processor=other` and `--processor=bf16` show those that do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

PROCESSORS = {"this": "as it is", "other": "products rounded otherwise", "bf16": "that, and searches in bf16"}
_aten = torch.ops.aten
# What is multiplied: the index of the first factor among the arguments. Out-of-place, in place and into a given tensor.
PRODUCTS = {_aten.dot.default: 0} | {
    getattr(packet, overload): first
    for first, packets in ((0, (_aten.mm, _aten.bmm, _aten.mv)), (1, (_aten.addmm, _aten.baddbmm, _aten.addmv)))
    for packet in packets
    for overload in ("default", "out")
}
PRODUCTS |= {_aten.addmm_.default: 1, _aten.baddbmm_.default: 1, _aten.addmv_.default: 1}


class OtherRounding(TorchDispatchMode):
    """Takes the terms of every sum of a product in the opposite order, in fp32: other last bits, the same at every call."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = PRODUCTS.get(func)
        if first is not None and args[first].dtype == torch.float32:
            a, b = args[first : first + 2]
            args = (*args[:first], a.flip(-1), b.flip(max(b.ndim - 2, 0)), *args[first + 2 :])
        return func(*args, **(kwargs or {}))


@contextmanager
def processor(name: str) -> Iterator[None]:
    """Computes as on one of PROCESSORS; compiled kernels and other processes stay as they are."""
    if name == "this":
        yield
        return
    with pytest.MonkeyPatch.context() as patch, OtherRounding():
        if name == "bf16":
            patch.setattr("topiarist.core.linalg.search_dtype", lambda device: torch.bfloat16)
            # The compiled step of ALPS needs instructions that this processor may not have; plain torch has the same bits.
            patch.setattr("topiarist.solvers.admm._kernels", lambda: None)
        yield
