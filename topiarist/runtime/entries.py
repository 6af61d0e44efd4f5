"""One tensor of a packed file: the parts it is stored as, what the header says of it, and the way back, verified.

| form     | values                                             | index                                                 |
|----------|----------------------------------------------------|-------------------------------------------------------|
| dense    | all, under the tensor's own name if floating-point | none                                                  |
| bitmask  | those that are not zero, in row-major order        | a bit a weight, least significant first               |
| 2:4      | two in every four                                  | version 1: two 2-bit positions a group, 4 bits        |
| six      | two in every four                                  | which of the six pairs it is, three groups a byte     |

Integers (`bits` 8 or 4) have a third part, scales (out, groups); those of 4 bits lie two in a byte, the first one lower.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int8, Shaped, UInt8
from torch import Tensor

from topiarist.quantization.grid import Grid, QuantizedWeight
from topiarist.runtime.bits import (
    PackedTensor,
    describe,
    index_of_pairs,
    nonzero_mask,
    pack,
    pack_bits,
    raw_bits,
    unpack,
    unpack_index,
    with_two_in_four,
)

Content = Tensor | QuantizedWeight
"""What a tensor of a packed folder is once it is read."""


@dataclass(frozen=True)
class Entry:
    """What a shard's header says of one tensor. `pattern` is for people; the rest is needed to read it back.

    dtype is that of the dense tensor, so of the scales where there are any. bits: of an integer; 0 for floating point.
    """

    form: str
    dtype: str
    shape: list[int]
    pattern: str
    sha256: str
    bits: int = 0

    @property
    def parts(self) -> list[str]:
        """The ends of the names under which the tensor is stored, after a colon."""
        if self.form == "dense" and not self.bits:
            return []
        return ["values", *(["index"] if self.form != "dense" else []), *(["scales"] if self.bits else [])]

    def names(self, name: str) -> list[str]:
        """The names under which tensor `name` is stored."""
        return [f"{name}:{part}" for part in self.parts] or [name]


def store(name: str, content: Content) -> tuple[dict[str, Tensor], Entry]:
    """The stored parts of a tensor by their names, and its entry."""
    if isinstance(content, QuantizedWeight):
        form, parts = pack_integers(content.q, content.grid.bits)
        parts["scales"] = content.scale
        dtype, shape, mask, bits = content.scale.dtype, content.q.shape, content.mask, content.grid.bits
    else:
        packed = pack(content)
        form = "dense" if packed is None else packed.form
        parts = {"": content} if packed is None else {"values": packed.values, "index": packed.index}
        dtype, shape, mask, bits = content.dtype, content.shape, nonzero_mask(content), 0
    pattern = "dense" if form == "dense" else describe(mask)
    plain = str(dtype).removeprefix("torch."), list(shape)
    entry = Entry(form, *plain, pattern, _digest(name, form, *plain, bits, list(parts.values())), bits)
    return dict(zip(entry.names(name), parts.values(), strict=True)), entry


def read_entry(stated: Any) -> Entry:
    """An entry from its JSON. Raises TypeError or ValueError if it is none."""
    entry = Entry(**stated)
    sizes = isinstance(entry.shape, list) and all(type(size) is int and size >= 0 for size in entry.shape)
    words = all(isinstance(word, str) for word in (entry.form, entry.dtype, entry.pattern, entry.sha256))
    if not sizes or not words or entry.bits not in (0, 4, 8) or isinstance(entry.bits, bool):
        raise ValueError(f"an entry of form {entry.form!r}, shape {entry.shape!r} and {entry.bits!r} bits")
    return entry


def restore(handle: Any, name: str, entry: Entry) -> Content:
    """The tensor, from an open file. Raises ValueError if its parts are not what the entry says."""
    # Before memory is taken for the dense shape: an index has a byte for at most twelve weights, integers for two.
    sizes = [math.prod(handle.get_slice(key).get_shape()) for key in entry.names(name)]
    if math.prod(entry.shape) > 12 * max(sizes, default=0):
        raise ValueError(f"its parts are too small for shape {entry.shape}")
    stored = [handle.get_tensor(key) for key in entry.names(name)]
    if _digest(name, entry.form, entry.dtype, entry.shape, entry.bits, stored) != entry.sha256:
        raise ValueError("its checksum does not match")
    if entry.bits:
        values, scales = stored[0], stored[-1]
        rows, columns = entry.shape
        if not (scales.ndim == 2 and scales.is_floating_point() and len(scales) == rows and scales.shape[1]):
            raise ValueError(
                f"its scales, {scales.dtype} of shape {tuple(scales.shape)}, do not fit shape {entry.shape}"
            )
        if columns % scales.shape[1]:
            raise ValueError(f"{scales.shape[1]} groups do not divide {columns} columns")
        codes = unpack_integers(entry.form, tuple(entry.shape), values, stored[1], entry.bits)
        group = None if scales.shape[1] == 1 else codes.shape[1] // scales.shape[1]
        return QuantizedWeight(codes, scales, Grid(bits=8 if entry.bits == 8 else 4, group=group))
    if str(stored[0].dtype) != f"torch.{entry.dtype}":
        raise ValueError(f"its values are {stored[0].dtype}, not {entry.dtype}")
    if entry.form == "dense":
        if list(stored[0].shape) != entry.shape:
            raise ValueError(f"its shape is {list(stored[0].shape)}, not {entry.shape}")
        return stored[0]
    return unpack(PackedTensor(entry.form, tuple(entry.shape), values=stored[0], index=stored[1]))


def pack_integers(codes: Int8[Tensor, "out in"], bits: int) -> tuple[str, dict[str, Tensor]]:
    """(form, values and index) in the fewest bytes; int8 values, or uint8 that hold two of 4 bits."""
    mask = (codes != 0).flatten()
    filled = with_two_in_four(mask, codes.shape[-1])
    sizes = {"dense": codes.numel() * bits / 8, "bitmask": float(mask.sum()) * bits / 8 + codes.numel() / 8}
    if filled is not None:
        sizes["six"] = codes.numel() * (bits / 16 + 1 / 12)
    form = min(sizes, key=lambda known: sizes[known])
    if form == "dense":
        return form, {"values": _joined(codes.flatten(), bits)}
    kept = mask if form == "bitmask" or filled is None else filled
    index = pack_bits(mask) if form == "bitmask" else index_of_pairs(kept)
    return form, {"values": _joined(codes.flatten()[kept], bits), "index": index}


def unpack_integers(
    form: str, shape: tuple[int, ...], values: Shaped[Tensor, "..."], index: Shaped[Tensor, "..."], bits: int
) -> Int8[Tensor, "out in"]:
    """The inverse of `pack_integers`. Raises ValueError if the parts do not belong together."""
    count = math.prod(shape)
    mask = torch.ones(count, dtype=torch.bool) if form == "dense" else unpack_index(form, index, count)
    kept = int(mask.sum())
    if values.numel() != math.ceil(kept * bits / 8):
        raise ValueError(f"{values.numel()} bytes of values for an index of {kept}")
    codes = torch.zeros(count, dtype=torch.int8)
    codes[mask] = _separate(values, bits)[:kept]
    return codes.view(shape)


def _joined(codes: Int8[Tensor, " count"], bits: int) -> Int8[Tensor, " count"] | UInt8[Tensor, " half"]:
    if bits == 8:
        return codes
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(torch.uint8) & 15
    return pairs[::2] | pairs[1::2] << 4


def _separate(values: Tensor, bits: int) -> Int8[Tensor, " count"]:
    if bits == 8:
        return values
    nibbles = torch.stack([values & 15, values >> 4], dim=1).flatten().view(torch.int8)
    return (nibbles ^ 8) - 8


def _digest(name: str, form: str, dtype: str, shape: list[int], bits: int, stored: Sequence[Tensor]) -> str:
    """SHA-256 over everything that decides what tensor is read back. The actual dtypes and shapes are in it as well."""
    actual = [[str(part.dtype), list(part.shape)] for part in stored]
    # Version 1 had no integers and no pairs: what it could hold has the same digest in both.
    version = [1] if not bits and form != "six" else [2, bits]
    digest = hashlib.sha256(json.dumps([*version, name, form, dtype, shape, actual]).encode())
    for part in stored:
        digest.update(np.ascontiguousarray(raw_bits(part).reshape(-1).numpy()).data)
    return digest.hexdigest()
