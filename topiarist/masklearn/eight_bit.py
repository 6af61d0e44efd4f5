"""Moments in eight bits: torchao's block-wise codes (Dettmers et al., arXiv 2110.02861), one scale for a stretch of a row.

No block crosses a row of the weight, so processes that hold some rows each hold the very blocks of the whole. Of the
second moment the root is kept: the codes span six decades, and a square that fell to zero would let its logit leap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from topiarist.core.errors import TopiaristError

LONGEST, SHORTEST = 256, 64


def block_size(row: int) -> int:
    """The longest block, at most 256 values and at least 64, that divides a row of `row` values; else the row itself."""
    return next((size for size in range(LONGEST, SHORTEST - 1, -1) if row % size == 0), row)


def check_installed() -> None:
    """Raise TopiaristError if torchao is not installed."""
    try:
        import torchao.optim.subclass_8bit  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise TopiaristError("moments in eight bits need torchao: pip install 'topiarist[eight-bit]'") from None


def zeros(shape: Sequence[int], *, signed: bool, device: torch.device) -> Tensor:
    """A moment of shape (out, ...) at zero. Raises TopiaristError if torchao is not installed."""
    check_installed()
    from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

    size = block_size(torch.Size(shape[1:]).numel())
    return OptimState8bit.zeros(tuple(shape), signed, size, device, dtype=torch.float32)


def quantised(moment: Shaped[Tensor, "..."]) -> bool:
    """Whether a moment is held in eight-bit codes."""
    return hasattr(moment, "codes")


def parts(name: str, moment: Shaped[Tensor, "..."]) -> dict[str, Tensor]:
    """The plain tensors that a state consists of, by name; they share its memory."""
    if not quantised(moment):
        return {name: moment}
    stored: Any = moment
    return {f"{name} codes": stored.codes, f"{name} scale": stored.scale}
