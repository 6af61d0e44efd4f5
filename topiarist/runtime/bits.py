"""A sparse tensor without its zeros: the values that remain, and where they stand. Exactly reversible, any dtype.

Two forms, of which the smaller is taken:

| form    | values kept                                      | index                                              |
|---------|--------------------------------------------------|----------------------------------------------------|
| bitmask | every element that is not +0, in row-major order | 1 bit per element, least significant bit first     |
| 2:4     | exactly two per group of four                    | two 2-bit positions per group, first group lowest  |

An element counts as zero only if ALL its bits are zero. A -0.0 is therefore kept as a value, as is any NaN with its
payload: packing works on bits and never on numbers, so unpacking cannot differ from what was packed. A 2:4 group with
fewer than two values stores a zero in the free slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type that shows the bits of an element of so many bytes."""


@dataclass(frozen=True)
class PackedTensor:
    """`form` is "bitmask" or "2:4"; `values` is flat and in the tensor's own dtype; `index` is flat uint8."""

    form: str
    shape: tuple[int, ...]
    values: Tensor
    index: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of values and index together."""
        return self.values.nbytes + self.index.nbytes


def raw_bits(tensor: Tensor) -> Tensor:
    """The same memory as integers of the same width, contiguous."""
    return tensor.detach().contiguous().view(RAW[tensor.element_size()])


def nonzero_mask(tensor: Tensor) -> Tensor:
    """Bool, True where any bit is set (so True for -0.0)."""
    return raw_bits(tensor) != 0


def pack(tensor: Tensor) -> PackedTensor | None:
    """The smaller packed form of a tensor, or None if the tensor is no larger as it is."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.ndim == 0 or tensor.numel() == 0:
        return None
    bits = raw_bits(tensor).flatten()
    mask = bits != 0
    index_bytes = math.ceil(tensor.numel() / 8)
    bitmask = int(mask.sum()) * tensor.element_size() + index_bytes
    semi_structured = _two_four_fits(mask, tensor.shape[-1])
    two_four = tensor.numel() // 2 * tensor.element_size() + index_bytes
    if min(bitmask, two_four if semi_structured else bitmask) >= tensor.nbytes:
        return None
    index = pack_bits(mask)
    form = "bitmask"
    if semi_structured and two_four <= bitmask:
        form = "2:4"
        full = _FILLED[index.numpy()]
        mask = unpack_bits(torch.from_numpy(full), tensor.numel())
        index = torch.from_numpy(_CODE_OF_MASK[full])
    values = bits[mask].view(tensor.dtype)
    return PackedTensor(form, tuple(tensor.shape), values, index)


def unpack(packed: PackedTensor) -> Tensor:
    """The tensor that was packed, bit for bit.

    Raises ValueError if values and index do not belong together or to the shape.
    """
    count = math.prod(packed.shape)
    if packed.index.dtype != torch.uint8 or packed.index.numel() != math.ceil(count / 8):
        raise ValueError(f"an index of {packed.index.numel()} bytes does not fit shape {packed.shape}")
    index = packed.index.numpy()
    if packed.form == "2:4":
        index = _MASK_OF_CODE[index]
    elif packed.form != "bitmask":
        raise ValueError(f"packed form {packed.form!r} is not known")
    mask = unpack_bits(torch.from_numpy(index), count)
    values = raw_bits(packed.values)
    if int(mask.sum()) != values.numel():
        raise ValueError(f"{values.numel()} values for an index of {int(mask.sum())}")
    bits = torch.zeros(count, dtype=values.dtype)
    bits[mask] = values
    return bits.view(packed.values.dtype).reshape(packed.shape)


def pack_bits(mask: Tensor) -> Tensor:
    """A flat bool tensor as bytes, least significant bit first; the last byte is filled up with zeros."""
    return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))


def unpack_bits(index: Tensor, count: int) -> Tensor:
    """The first `count` bits of `index` as bool."""
    return torch.from_numpy(np.unpackbits(index.numpy(), count=count, bitorder="little")).view(torch.bool)


def describe(mask: Tensor) -> str:
    """A mask in the words of `parse_pattern`: "2:4" if every group of four has at most two and nearly all have, else its
    sparsity. Nearly: a weight that was zero before pruning may be among the kept.
    """
    kept = int(mask.sum())
    for of in (4, 8, 16, 32):
        if mask.ndim and mask.shape[-1] % of == 0 and 0 < kept < mask.numel():
            groups = mask.unflatten(-1, (-1, of))
            if bool(groups[:16].all(-1).any()):  # a full group among the first: not this pattern, and no need to count
                continue
            keep = int(groups.sum(-1, dtype=torch.int8).max())
            if keep < of and kept * of >= 0.95 * keep * mask.numel():
                return f"{keep}:{of}"
    return f"{1 - kept / max(mask.numel(), 1):.4g}"


def _two_four_fits(mask: Tensor, width: int) -> bool:
    """Whether every group of four along the last axis has at most two values, and groups fill whole bytes."""
    return width % 4 == 0 and mask.numel() % 8 == 0 and int(mask.view(-1, 4).sum(-1).max()) <= 2


def _two_four_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three tables over bytes, two groups each: mask -> mask with two bits a group, mask -> code, code -> mask.

    A group's code is its two positions, first + 4 * second. Groups with more than two bits have no meaning here.
    """
    filled = np.zeros(16, np.uint8)
    for mask in range(16):
        kept = [i for i in range(4) if mask >> i & 1]
        free = [i for i in range(4) if not mask >> i & 1]
        filled[mask] = sum(1 << i for i in (kept + free)[:2])
    code, back = np.zeros(16, np.uint8), np.zeros(16, np.uint8)
    for second in range(4):
        for first in range(second):
            code[1 << first | 1 << second] = first | second << 2
            back[first | second << 2] = 1 << first | 1 << second
    low, high = np.arange(256) & 15, np.arange(256) >> 4
    return tuple(table[low] | table[high] << 4 for table in (filled, code, back))  # pyright: ignore[reportReturnType]


_FILLED, _CODE_OF_MASK, _MASK_OF_CODE = _two_four_tables()
