"""Masks as bytes: by candidate index for N:M, as a bitmap for everything else.

A group of an N:M mask is one of C = C(of, keep) rows, so it is a digit in base C; as many digits as fit share one
byte ("index8": 2:4 has C = 6, three groups a byte, 0.667 bit a weight) or one 64-bit word ("index64": 4:8 takes 0.8
bit where bytes would take 1.0). The first group is the lowest digit; words are little-endian. "bitmap": bit i % 8 of
byte i // 8 is weight i, in row order.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from topiarist.core.errors import CheckpointError, PatternError
from topiarist.core.patterns import NM, Pattern
from topiarist.masklearn.candidates import index_of, mask_of, num_classes

Encoding = Literal["bitmap", "index8", "index64"]
BITMAP: Encoding = "bitmap"
INDEX8: Encoding = "index8"
INDEX64: Encoding = "index64"


def encoding_for(pattern: Pattern) -> Encoding:
    """The smallest encoding of masks of a pattern; bytes win ties because they allow random access."""
    if not isinstance(pattern, NM):
        return BITMAP
    per_byte, per_word = _digits(pattern, 8), _digits(pattern, 64)
    if max(per_word, 8 * per_byte) * pattern.of <= 64:
        return BITMAP  # not below one bit a weight
    return INDEX64 if per_word > 8 * per_byte else INDEX8


def _digits(pattern: NM, bits: int) -> int:
    """How many base-C digits fit into so many bits."""
    digits = 0
    while num_classes(pattern) ** (digits + 1) <= 1 << bits:
        digits += 1
    return digits


def packed_size(shape: tuple[int, ...], pattern: Pattern, encoding: str) -> int:
    """Bytes of a packed mask of that shape."""
    total = math.prod(shape)
    if encoding == BITMAP:
        return -(-total // 8)
    bits = 8 if encoding == INDEX8 else 64
    return -(-(total // pattern.of) // _digits(pattern, bits)) * bits // 8  # pyright: ignore


def pack(mask: Bool[Tensor, "..."], pattern: Pattern) -> tuple[UInt8[Tensor, " bytes"], Encoding]:
    """Bytes and the encoding's name. Groups run along the last axis. PatternError for a mask of another pattern."""
    encoding = encoding_for(pattern)
    flat = mask.detach().cpu().contiguous()
    if encoding == BITMAP:
        if not _holds(flat, pattern):
            raise PatternError(f"the mask keeps more weights than {pattern} allows")
        return torch.from_numpy(np.packbits(flat.flatten().numpy(), bitorder="little")), encoding
    assert isinstance(pattern, NM)
    digits = index_of(flat.reshape(-1, pattern.of), pattern).numpy()
    word = np.uint8 if encoding == INDEX8 else np.dtype("<u8")
    per_word = _digits(pattern, 8 if encoding == INDEX8 else 64)
    digits = np.pad(digits, (0, -len(digits) % per_word)).reshape(-1, per_word).astype(word)
    packed = np.zeros(len(digits), dtype=word)
    for place in reversed(range(per_word)):
        packed = packed * word_of(num_classes(pattern), word) + digits[:, place]
    return torch.from_numpy(packed.view(np.uint8).copy()), encoding


def unpack(
    packed: UInt8[Tensor, " bytes"], shape: tuple[int, ...], pattern: Pattern, encoding: str
) -> Bool[Tensor, "..."]:
    """The mask. Raises CheckpointError for a wrong number of bytes, a candidate that does not exist, or a bitmap that breaks
    its pattern.
    """
    check_packed(("U8", len(packed)), shape, pattern, encoding)
    raw = packed.numpy()
    if encoding == BITMAP:
        mask = torch.from_numpy(np.unpackbits(raw, count=math.prod(shape), bitorder="little")).bool().view(shape)
        if not _holds(mask, pattern):
            raise CheckpointError(f"the mask keeps more weights than {pattern} allows")
        return mask
    assert isinstance(pattern, NM)
    word = np.uint8 if encoding == INDEX8 else np.dtype("<u8")
    per_word = _digits(pattern, 8 if encoding == INDEX8 else 64)
    rest = raw.view(word)
    base: Any = word_of(num_classes(pattern), word)
    digits = np.empty((len(rest), per_word), dtype=np.int64)
    for place in range(per_word):
        digits[:, place] = rest % base
        rest = rest // base
    if rest.any():
        raise CheckpointError(f"the packed {pattern} mask holds a candidate that does not exist: the file is damaged")
    groups = math.prod(shape) // pattern.of
    return mask_of(torch.from_numpy(digits.reshape(-1)[:groups]), pattern).view(shape)


def check_packed(stored: tuple[str, int], shape: tuple[int, ...], pattern: Pattern, encoding: str) -> None:
    """Raise CheckpointError unless so many stored bytes can be a mask of that shape; nothing is allocated.

    stored: (dtype in safetensors' word, how many).
    """
    if encoding != BITMAP and (
        encoding not in (INDEX8, INDEX64) or not isinstance(pattern, NM) or shape[-1] % pattern.of
    ):
        raise CheckpointError(f"no {pattern} mask of shape {shape} is packed as {encoding}")
    if stored != ("U8", packed_size(shape, pattern, encoding)):
        raise CheckpointError(
            f"{stored[1]} elements of {stored[0]} do not hold a {pattern} mask of shape {shape} ({encoding})"
        )


def _holds(mask: Bool[Tensor, "..."], pattern: Pattern) -> bool:
    """Whether every matrix of a stack keeps the pattern."""
    matrices = mask.reshape(1, -1) if mask.ndim < 2 else mask
    return all(pattern.holds(matrix) for matrix in matrices.reshape(-1, *matrices.shape[-2:]))


def word_of(value: int, dtype: Any) -> Any:
    """A scalar of the words' own type, so that numpy does not widen the arithmetic."""
    return np.dtype(dtype).type(value)
