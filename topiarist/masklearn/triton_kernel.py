"""The same mask arithmetic as Triton kernels, one pass over memory each way. Imports Triton: import this file lazily.

A program handles a block of groups of one row. All classes of a group sit in one tile (padded to a power of two), so
probabilities, their largest value and their sum never leave registers. Names and formulas: relax.py. Noise: noise.py,
bit by bit.

Tested on a CPU through Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float
from torch import Tensor

from topiarist.masklearn.candidates import candidates
from topiarist.masklearn.relax import Bernoulli, Categorical, TopN
from topiarist.masklearn.relaxation import Draw, Relaxation

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
def _place(groups, CLASSES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """(this program's groups, classes, which pairs of them there are)."""
    g = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, PADDED)
    return g, c, (c < CLASSES)[:, None] & (g < groups)[None, :]


@triton.jit
def _uniform(key0, key1, first_row, first_group, g, c, CLASSES: tl.constexpr):
    """u of noise.py, (PADDED, BLOCK), for this program's row."""
    word0, word1 = key0.to(tl.uint32), key1.to(tl.uint32)
    k0 = _mix((tl.program_id(0) + first_row).to(tl.uint32) ^ word0, word1)
    k1 = _mix(k0 ^ word1, word0)
    counter = ((g + first_group)[None, :] * CLASSES + c[:, None]).to(tl.uint32)
    bits = _mix(counter ^ k0, k1) >> 9
    return (bits.to(tl.float32) + 0.5) * (2.0**-23)


@triton.jit
def _noisy(logits, groups, kappa, key0, key1, first_row, first_group, g, c, inside, CLASSES: tl.constexpr):
    """kappa pi + g (PADDED, BLOCK) of this program's groups; -inf in the padding."""
    at = (tl.program_id(0).to(tl.int64) * CLASSES + c[:, None]) * groups + g[None, :]
    pi = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    u = _uniform(key0, key1, first_row, first_group, g, c, CLASSES)
    return tl.where((c < CLASSES)[:, None], kappa * pi - tl.log(-tl.log(u)), float("-inf"))


@triton.jit
def _softmax(z, tau):
    y = tl.exp((z - tl.max(z, axis=0)[None, :]) / tau)
    return y / tl.sum(y, axis=0)[None, :]


@triton.jit(do_not_specialize=VARYING)
def _categorical_forward(
    weight, logits, grad, out, S, groups, kappa, tau, lam, key0, key1, first_row, first_group,
    CLASSES: tl.constexpr, OF: tl.constexpr, KEEP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g, c, inside = _place(groups, CLASSES, PADDED, BLOCK)
    y = _softmax(_noisy(logits, groups, kappa, key0, key1, first_row, first_group, g, c, inside, CLASSES), tau)
    at = (tl.program_id(0).to(tl.int64) * groups + g) * OF
    for j in tl.static_range(OF):
        S_j = tl.load(S + c * OF + j, mask=c < CLASSES, other=0.0)
        M = tl.sum(y * S_j[:, None], axis=0)
        W = tl.load(weight + at + j, mask=g < groups, other=0.0).to(tl.float32)
        tl.store(out + at + j, (W * M).to(out.dtype.element_ty), mask=g < groups)


@triton.jit(do_not_specialize=VARYING)
def _categorical_backward(
    weight, logits, grad, out, S, groups, kappa, tau, lam, key0, key1, first_row, first_group,
    CLASSES: tl.constexpr, OF: tl.constexpr, KEEP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g, c, inside = _place(groups, CLASSES, PADDED, BLOCK)
    y = _softmax(_noisy(logits, groups, kappa, key0, key1, first_row, first_group, g, c, inside, CLASSES), tau)
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


@triton.jit
def _take(r, tau):
    """One of TopN's draws: (its softmax a, 1 - a with a cut at 1 - 1e-6, r for the next draw)."""
    a = _softmax(r, tau)
    left = 1.0 - tl.minimum(a, 1.0 - 1e-6)
    return a, left, r + tl.log(left)


@triton.jit
def _take_all(r, tau, KEEP: tl.constexpr):
    M = tl.zeros_like(r)
    for _ in tl.static_range(KEEP):
        a, _left, r = _take(r, tau)
        M += a
    return M


@triton.jit(do_not_specialize=VARYING)
def _topn_forward(
    weight, logits, grad, out, S, groups, kappa, tau, lam, key0, key1, first_row, first_group,
    CLASSES: tl.constexpr, OF: tl.constexpr, KEEP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g, c, inside = _place(groups, CLASSES, PADDED, BLOCK)
    M = _take_all(_noisy(logits, groups, kappa, key0, key1, first_row, first_group, g, c, inside, CLASSES), tau, KEEP)
    at = (tl.program_id(0).to(tl.int64) * groups + g[None, :]) * OF + c[:, None]
    W = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (W * M).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _topn_backward(
    weight, logits, grad, out, S, groups, kappa, tau, lam, key0, key1, first_row, first_group,
    CLASSES: tl.constexpr, OF: tl.constexpr, KEEP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g, c, inside = _place(groups, CLASSES, PADDED, BLOCK)
    first = _noisy(logits, groups, kappa, key0, key1, first_row, first_group, g, c, inside, CLASSES)
    at = (tl.program_id(0).to(tl.int64) * groups + g[None, :]) * OF + c[:, None]
    W = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    G = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    dM = (G - 2.0 * lam * W * _take_all(first, tau, KEEP)) * W
    dr = tl.zeros_like(dM)
    for behind in tl.static_range(KEEP):  # the draws in reverse, each drawn again from the first: nothing is stored
        r = first
        for _ in tl.static_range(KEEP - 1 - behind):
            _a, _left, r = _take(r, tau)
        a, left, _r = _take(r, tau)
        da = dM - tl.where(a < 1.0 - 1e-6, dr / left, 0.0)
        dr += a * (da - tl.sum(a * da, axis=0)[None, :]) / tau
    tl.store(
        out + (tl.program_id(0).to(tl.int64) * CLASSES + c[:, None]) * groups + g[None, :], kappa * dr, mask=inside
    )


@triton.jit
def _gate(logits, groups, kappa, tau, key0, key1, first_row, first_group, at, g, c, inside):
    """M (1, BLOCK) of Bernoulli's gates: one class, one weight a group."""
    u = _uniform(key0, key1, first_row, first_group, g, c, 1)
    pi = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    return 1.0 / (1.0 + tl.exp(-(kappa * pi + tl.log(u) - tl.log(1.0 - u)) / tau))


@triton.jit(do_not_specialize=VARYING)
def _bernoulli_forward(
    weight, logits, grad, out, S, groups, kappa, tau, lam, key0, key1, first_row, first_group,
    CLASSES: tl.constexpr, OF: tl.constexpr, KEEP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g, c, inside = _place(groups, CLASSES, PADDED, BLOCK)
    at = tl.program_id(0).to(tl.int64) * groups + g[None, :] + c[:, None]
    M = _gate(logits, groups, kappa, tau, key0, key1, first_row, first_group, at, g, c, inside)
    W = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (W * M).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _bernoulli_sums(
    weight, logits, grad, out, S, groups, kappa, tau, lam, key0, key1, first_row, first_group,
    CLASSES: tl.constexpr, OF: tl.constexpr, KEEP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of M of every program, (rows, programs of a row): what the density penalty needs before a gradient."""
    g, c, inside = _place(groups, CLASSES, PADDED, BLOCK)
    at = tl.program_id(0).to(tl.int64) * groups + g[None, :] + c[:, None]
    M = _gate(logits, groups, kappa, tau, key0, key1, first_row, first_group, at, g, c, inside)
    total = tl.sum(tl.sum(tl.where(inside, M, 0.0), axis=1), axis=0)
    tl.store(out + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit(do_not_specialize=VARYING)
def _bernoulli_backward(
    weight, logits, grad, out, S, groups, kappa, tau, lam, key0, key1, first_row, first_group,
    CLASSES: tl.constexpr, OF: tl.constexpr, KEEP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S holds the push of the density penalty: one number, on the device."""
    g, c, inside = _place(groups, CLASSES, PADDED, BLOCK)
    at = tl.program_id(0).to(tl.int64) * groups + g[None, :] + c[:, None]
    M = _gate(logits, groups, kappa, tau, key0, key1, first_row, first_group, at, g, c, inside)
    W = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    G = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    dM = (G - 2.0 * lam * W * M) * W + tl.load(S)
    tl.store(out + at, (kappa / tau) * M * (1.0 - M) * dM, mask=inside)


KERNELS = {
    Categorical: (_categorical_forward, _categorical_backward),
    TopN: (_topn_forward, _topn_backward),
    Bernoulli: (_bernoulli_forward, _bernoulli_backward),
}


def forward(
    relaxation: Relaxation, weight: Float[Tensor, "out in"], logits: Float[Tensor, "out classes groups"], draw: Draw
) -> Float[Tensor, "out in"]:
    """W * M (out, in) in the weight's dtype. Logits (out, classes, groups)."""
    out = torch.empty_like(weight)
    _launch(KERNELS[type(relaxation)][0], relaxation, weight, logits, draw, out, out, _table(relaxation, weight))
    return out


def backward(
    relaxation: Relaxation,
    weight: Float[Tensor, "out in"],
    logits: Float[Tensor, "out classes groups"],
    grad_effective: Float[Tensor, "out in"],
    draw: Draw,
) -> Float[Tensor, "out classes groups"]:
    """dpi (out, classes, groups) in fp32 for grad_effective (out, in). The host waits for nothing."""
    extra = _table(relaxation, weight)
    if isinstance(relaxation, Bernoulli):
        rows, _, groups = logits.shape
        sums = torch.empty(rows, triton.cdiv(groups, TILE), dtype=torch.float32, device=weight.device)
        _launch(_bernoulli_sums, relaxation, weight, logits, draw, sums, sums, extra)
        extra = relaxation.push(sums.sum() / weight.numel(), draw)
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _launch(KERNELS[type(relaxation)][1], relaxation, weight, logits, draw, grad_effective, out, extra)
    return out


def _table(relaxation: Relaxation, weight: Tensor) -> Tensor:
    """The candidates as numbers; for relaxations that have none, any tensor of the device."""
    if isinstance(relaxation, Categorical):
        return candidates(relaxation.pattern, weight.device).float()
    return weight


def _launch(
    kernel, relaxation: Relaxation, weight: Tensor, logits: Tensor, draw: Draw, grad: Tensor, out: Tensor, extra: Tensor
) -> None:
    rows, classes, groups = logits.shape
    padded = triton.next_power_of_2(classes)
    block = max(16, TILE // padded)
    with torch.cuda.device_of(weight):  # Triton launches on the current device, wherever the tensors lie
        kernel[rows, triton.cdiv(groups, block)](
            weight, logits, grad, out, extra, groups, draw.kappa, draw.tau, draw.lam, draw.key[0], draw.key[1],
            draw.first_row, draw.first_group, CLASSES=classes, OF=weight.shape[1] // groups,
            KEEP=relaxation.pattern.keep if isinstance(relaxation, TopN) else 0, PADDED=padded, BLOCK=block,
        )  # fmt: skip
