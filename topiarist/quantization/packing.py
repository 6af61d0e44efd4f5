"""Integers of a few bits inside 32-bit words, lowest bits first: the layout that most quantised formats share."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from topiarist.core.errors import QuantizationError


def pack(q: Int[Tensor, "rows columns"], bits: int) -> Int[Tensor, "rows words"]:
    """Unsigned integers below 2^bits, column j of a word in bits [bits * j, bits * j + bits); the last word is filled with 0.

    Raises QuantizationError if words do not hold a whole number of integers.
    """
    count = _in_a_word(bits)
    rows, columns = q.shape
    padded = torch.nn.functional.pad(q.to(torch.int64), (0, -columns % count)).view(rows, -1, count)
    words = (padded << (bits * torch.arange(count, device=q.device))).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: Int[Tensor, "rows words"], bits: int, columns: int) -> Int[Tensor, "rows columns"]:
    """The inverse of `pack`, as int16. Raises QuantizationError if the words hold fewer than `columns` integers."""
    count = _in_a_word(bits)
    if words.dtype != torch.int32 or words.shape[1] * count < columns:
        raise QuantizationError(
            f"{columns} integers of {bits} bits do not come from {tuple(words.shape)} words of {words.dtype}: the file is "
            "damaged; download it again"
        )
    shifts = bits * torch.arange(count, device=words.device, dtype=torch.int32)
    q = (words[:, :, None] >> shifts) & ((1 << bits) - 1)
    return q.flatten(1)[:, :columns].to(torch.int16)


def _in_a_word(bits: int) -> int:
    if bits not in (2, 4, 8):
        raise QuantizationError(f"integers of {bits} bits are not read or written; those of 2, 4 and 8 are")
    return 32 // bits
