"""A sparse tensor without its zeros: the values that remain, and where they stand. Exactly reversible, any dtype.

Two forms, of which the smaller is taken, and one that is only read:

| form    | values kept                                      | index                                                  |
|---------|--------------------------------------------------|--------------------------------------------------------|
| bitmask | every element that is not +0, in row-major order | 1 bit per element, least significant bit first         |
| six     | exactly two per group of four                    | three groups a byte, each a digit to base six: which   |
|         |                                                  | of the six pairs of places, in the order of `PAIRS`    |
| 2:4     | exactly two per group of four                    | two 2-bit positions per group, first group lowest      |

An element counts as zero only if ALL its bits are zero. A -0.0 is therefore kept as a value, as is any NaN with its
payload: packing works on bits and never on numbers, so unpacking cannot differ from what was packed. A 2:4 group with
fewer than two values stores a zero in the free slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor

RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type that shows the bits of an element of so many bytes."""


@dataclass(frozen=True)
class PackedTensor:
    """`form` is "bitmask", "six" or "2:4"; `values` is flat and in the tensor's own dtype; `index` is flat uint8."""

    form: str
    shape: tuple[int, ...]
    values: Tensor
    index: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of values and index together."""
        return self.values.nbytes + self.index.nbytes


def raw_bits(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The same memory as integers of the same width, contiguous."""
    return tensor.detach().contiguous().view(RAW[tensor.element_size()])


def nonzero_mask(tensor: Shaped[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Bool, True where any bit is set (so True for -0.0)."""
    return raw_bits(tensor) != 0


def pack(tensor: Shaped[Tensor, "..."]) -> PackedTensor | None:
    """The smaller packed form of a tensor, or None if the tensor is no larger as it is."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.ndim == 0 or tensor.numel() == 0:
        return None
    bits = raw_bits(tensor).flatten()
    mask = bits != 0
    index_bytes = math.ceil(tensor.numel() / 8)
    bitmask = int(mask.sum()) * tensor.element_size() + index_bytes
    filled = with_two_in_four(mask, tensor.shape[-1])
    pairs = tensor.numel() // 2 * tensor.element_size() + math.ceil(tensor.numel() / 12)
    if min(bitmask, bitmask if filled is None else pairs) >= tensor.nbytes:
        return None
    form, index = "bitmask", pack_bits(mask)
    if filled is not None and pairs <= bitmask:
        form, index, mask = "six", index_of_pairs(filled), filled
    values = bits[mask].view(tensor.dtype)
    return PackedTensor(form, tuple(tensor.shape), values, index)


def unpack(packed: PackedTensor) -> Tensor:
    """The tensor that was packed, bit for bit.

    Raises ValueError if values and index do not belong together or to the shape.
    """
    count = math.prod(packed.shape)
    mask = unpack_index(packed.form, packed.index, count)
    values = raw_bits(packed.values)
    if int(mask.sum()) != values.numel():
        raise ValueError(f"{values.numel()} values for an index of {int(mask.sum())}")
    bits = torch.zeros(count, dtype=values.dtype)
    bits[mask] = values
    return bits.view(packed.values.dtype).reshape(packed.shape)


def pack_bits(mask: Bool[Tensor, " count"]) -> UInt8[Tensor, " bytes"]:
    """A flat bool tensor as bytes, least significant bit first; the last byte is filled up with zeros."""
    return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))


def unpack_bits(index: UInt8[Tensor, "..."], count: int) -> Bool[Tensor, " count"]:
    """The first `count` bits of `index` as bool."""
    return torch.from_numpy(np.unpackbits(index.numpy(), count=count, bitorder="little")).view(torch.bool)


def unpack_index(form: str, index: Shaped[Tensor, "..."], count: int) -> Bool[Tensor, " count"]:
    """Flat bool, True where a value is stored. Raises ValueError if the index is not one of `count` elements."""
    sizes = {"bitmask": math.ceil(count / 8), "2:4": math.ceil(count / 8), "six": math.ceil(count / 12)}
    if form not in sizes:
        raise ValueError(f"packed form {form!r} is not known")
    if index.dtype != torch.uint8 or index.numel() != sizes[form]:
        raise ValueError(f"an index of {index.numel()} bytes does not fit {count} elements")
    if form == "bitmask":
        return unpack_bits(index, count)
    if form == "2:4":
        return unpack_bits(torch.from_numpy(_MASK_OF_CODE[index.numpy()]), count)
    if index.numel() and int(index.max()) >= 216:
        raise ValueError("its index names a pair that does not exist")
    digits = np.stack([index.numpy() // 6**place % 6 for place in range(3)], axis=1).reshape(-1)[: count // 4]
    return torch.from_numpy(
        np.unpackbits(_PAIR_BITS[digits][:, None], axis=1, count=4, bitorder="little").reshape(-1)
    ).bool()


def index_of_pairs(mask: Bool[Tensor, " count"]) -> UInt8[Tensor, " bytes"]:
    """The index "six" of a flat mask with two in every four."""
    nibbles = np.packbits(mask.numpy().reshape(-1, 4), axis=1, bitorder="little")[:, 0]
    digits = _PAIR_OF_BITS[nibbles]
    digits = np.pad(digits, (0, -len(digits) % 3)).reshape(-1, 3)
    return torch.from_numpy(digits[:, 0] + 6 * digits[:, 1] + 36 * digits[:, 2])


def with_two_in_four(mask: Bool[Tensor, " count"], width: int) -> Bool[Tensor, " count"] | None:
    """A flat mask with more bits, so that each group of four along rows of `width` has two; None if one has more."""
    if width % 4:
        return None
    nibbles = np.packbits(mask.numpy().reshape(-1, 4), axis=1, bitorder="little")[:, 0]
    if _COUNTS[nibbles].max(initial=0) > 2:
        return None
    return torch.from_numpy(
        np.unpackbits(_FILLED[nibbles][:, None], axis=1, count=4, bitorder="little").reshape(-1)
    ).bool()


def describe(mask: Bool[Tensor, "*shape"]) -> str:
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


PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""Places of the two values of a group, by their digit in the index "six"."""


def _tables() -> tuple[np.ndarray, ...]:
    """Over the 16 masks of a group: how many bits it has, the same with two bits, its digit. Over digits: the mask. Over
    bytes of version 1, two groups each, first position + 4 * second: the mask of both.
    """
    masks = np.arange(16, dtype=np.uint8)
    counts = np.array([int(mask).bit_count() for mask in masks], np.uint8)
    filled, digit, old = np.zeros(16, np.uint8), np.zeros(16, np.uint8), np.zeros(16, np.uint8)
    of_digit = np.array([1 << first | 1 << second for first, second in PAIRS], np.uint8)
    digit[of_digit] = np.arange(6)
    for mask in range(16):
        kept = [i for i in range(4) if mask >> i & 1]
        free = [i for i in range(4) if not mask >> i & 1]
        filled[mask] = sum(1 << i for i in (kept + free)[:2])
    for first, second in PAIRS:
        old[first | second << 2] = 1 << first | 1 << second
    both = np.arange(256)
    return counts, filled, digit, of_digit, old[both & 15] | old[both >> 4] << 4


_COUNTS, _FILLED, _PAIR_OF_BITS, _PAIR_BITS, _MASK_OF_CODE = _tables()
