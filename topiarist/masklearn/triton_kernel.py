"""The same mask arithmetic as Triton kernels, one pass over memory each way. Imports Triton: import this file lazily.

A program handles a block of groups of one row. All classes of a group sit in one tile (padded to a power of two), so y,
its largest value and its sum never leave registers. Names and formulas: relax.py. Noise: noise.py, bit by bit.

Tested on a CPU through Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from topiarist.masklearn.relax import Draw

TILE = 1024  # classes (padded) x groups of one program
VARYING = ["key0", "key1", "first_row", "first_group"]  # change at every step: no compiled variants of their own


@triton.jit
def _mix(x, k1):
    x = x ^ (x >> 16)
    x = x * tl.full((), 0x7FEB352D, tl.uint32)
    x = x + k1
    x = x ^ (x >> 15)
    x = x * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _probabilities(logits, groups, kappa, tau, key0, key1, first_row, first_group, g, c, inside, CLASSES: tl.constexpr):
    """y (PADDED, BLOCK) of this program's groups; padding has probability zero."""
    row = tl.program_id(0)
    pi = tl.load(logits + (row.to(tl.int64) * CLASSES + c[:, None]) * groups + g[None, :], mask=inside, other=0.0)
    word0, word1 = key0.to(tl.uint32), key1.to(tl.uint32)
    k0 = _mix((row + first_row).to(tl.uint32) ^ word0, word1)
    k1 = _mix(k0 ^ word1, word0)
    counter = ((g + first_group)[None, :] * CLASSES + c[:, None]).to(tl.uint32)
    bits = _mix(counter ^ k0, k1) >> 9
    u = (bits.to(tl.float32) + 0.5) * (2.0**-23)
    z = kappa * pi.to(tl.float32) - tl.log(-tl.log(u))
    z = tl.where((c < CLASSES)[:, None], z, float("-inf"))
    y = tl.exp((z - tl.max(z, axis=0)[None, :]) / tau)
    return y / tl.sum(y, axis=0)[None, :]


@triton.jit(do_not_specialize=VARYING)
def _forward(
    weight, logits, S, grad, out, groups, kappa, tau, lam, key0, key1, first_row, first_group,
    CLASSES: tl.constexpr, OF: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, PADDED)
    inside = (c < CLASSES)[:, None] & (g < groups)[None, :]
    y = _probabilities(logits, groups, kappa, tau, key0, key1, first_row, first_group, g, c, inside, CLASSES)
    at = (tl.program_id(0).to(tl.int64) * groups + g) * OF
    for j in tl.static_range(OF):
        S_j = tl.load(S + c * OF + j, mask=c < CLASSES, other=0.0)
        M = tl.sum(y * S_j[:, None], axis=0)
        W = tl.load(weight + at + j, mask=g < groups, other=0.0).to(tl.float32)
        tl.store(out + at + j, (W * M).to(out.dtype.element_ty), mask=g < groups)


@triton.jit(do_not_specialize=VARYING)
def _backward(
    weight, logits, S, grad, out, groups, kappa, tau, lam, key0, key1, first_row, first_group,
    CLASSES: tl.constexpr, OF: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, PADDED)
    inside = (c < CLASSES)[:, None] & (g < groups)[None, :]
    y = _probabilities(logits, groups, kappa, tau, key0, key1, first_row, first_group, g, c, inside, CLASSES)
    at = (tl.program_id(0).to(tl.int64) * groups + g) * OF
    dy = tl.zeros_like(y)
    for j in tl.static_range(OF):
        S_j = tl.load(S + c * OF + j, mask=c < CLASSES, other=0.0)
        M = tl.sum(y * S_j[:, None], axis=0)
        W = tl.load(weight + at + j, mask=g < groups, other=0.0).to(tl.float32)
        G = tl.load(grad + at + j, mask=g < groups, other=0.0).to(tl.float32)
        dM = (G - 2.0 * lam * W * M) * W
        dy += S_j[:, None] * dM[None, :]
    dpi = (kappa / tau) * y * (dy - tl.sum(y * dy, axis=0)[None, :])
    tl.store(out + (tl.program_id(0).to(tl.int64) * CLASSES + c[:, None]) * groups + g[None, :], dpi, mask=inside)


def forward(weight: Tensor, logits: Tensor, S: Tensor, draw: Draw) -> Tensor:
    """W * M (out, in) in the weight's dtype. Logits (out, classes, groups), S bool (classes, of)."""
    out = torch.empty_like(weight)
    _launch(_forward, weight, logits, S, draw, out, out)
    return out


def backward(weight: Tensor, logits: Tensor, S: Tensor, grad_effective: Tensor, draw: Draw) -> Tensor:
    """dpi (out, classes, groups) in fp32 for grad_effective (out, in)."""
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _launch(_backward, weight, logits, S, draw, grad_effective, out)
    return out


def _launch(kernel, weight: Tensor, logits: Tensor, S: Tensor, draw: Draw, grad: Tensor, out: Tensor) -> None:
    rows, classes, groups = logits.shape
    padded = triton.next_power_of_2(classes)
    block = max(16, TILE // padded)
    kernel[rows, triton.cdiv(groups, block)](
        weight, logits, S.float(), grad, out, groups, draw.kappa, draw.tau, draw.lam, draw.key[0], draw.key[1],
        draw.first_row, draw.first_group, CLASSES=classes, OF=S.shape[1], PADDED=padded, BLOCK=block,
    )  # fmt: skip
