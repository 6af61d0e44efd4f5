"""The blocks of 32 weights that GGUF files are made of, from weights that are already on a grid.

Q8_0  scale fp16, then 32 int8                             value = scale * q
Q4_0  scale fp16, then 16 bytes; byte i holds q + 8 of     value = scale * (nibble - 8)
      weight i in its low and of weight i + 16 in its high nibble
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from topiarist.quantization.grid import QuantizedWeight

BLOCK = 32


def block_scales(weight: QuantizedWeight) -> Float[Tensor, "out blocks"] | None:
    """A scale for every 32 weights in fp16; None if blocks straddle groups or a scale changes in fp16."""
    width = weight.q.shape[1]
    group = width // weight.scale.shape[1]
    if group % BLOCK:
        return None
    half = weight.scale.to(torch.float16)
    if not torch.equal(half.float(), weight.scale.float()):
        return None
    return half.repeat_interleave(group // BLOCK, 1)


def q8_0(q: Int8[Tensor, "out in"], scale: Float[Tensor, "out blocks"]) -> UInt8[Tensor, "out bytes"]:
    """The rows of a Q8_0 tensor. scale: fp16, one for every 32 weights."""
    blocks = q.unflatten(1, (-1, BLOCK)).contiguous().view(torch.uint8)
    return torch.cat([_bytes(scale), blocks], 2).flatten(1)


def q4_0(q: Int8[Tensor, "out in"], scale: Float[Tensor, "out blocks"]) -> UInt8[Tensor, "out bytes"]:
    """The rows of a Q4_0 tensor. q: -8 to 7; scale: fp16, one for every 32 weights."""
    low, high = (q + 8).view(torch.uint8).unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return torch.cat([_bytes(scale), low | (high << 4)], 2).flatten(1)


def _bytes(scale: Float[Tensor, "out blocks"]) -> UInt8[Tensor, "out blocks 2"]:
    return scale.to(torch.float16).contiguous()[..., None].view(torch.uint8)
