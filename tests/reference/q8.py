"""The product of 8-bit inputs with integer weights, written out: what every kernel must give up to the order of sums."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32


def rounded_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (tokens, blocks, 32) and scales (tokens, blocks) of x (tokens, in), filled up with zeros."""
    blocks = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(-1)
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    return torch.round(blocks * inverse[..., None]), largest / 127


def product(codes: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    """y (tokens, out) in fp64 of codes (out, in), scales (out, groups) and x (tokens, in)."""
    rows, cols = codes.shape
    inputs, input_scales = rounded_inputs(x)
    y = torch.zeros(x.shape[0], rows, dtype=torch.float64)
    for block in range(inputs.shape[1]):
        part = codes[:, block * BLOCK : (block + 1) * BLOCK].double()
        group = block * BLOCK * scales.shape[1] // cols
        sums = inputs[:, block, : part.shape[1]].double() @ part.T
        y += sums * input_scales[:, block, None].double() * scales[:, group].double()
    return y
