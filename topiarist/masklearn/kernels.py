"""W * M forward and dpi backward, by the fastest path at hand, and the autograd functions that wrap them.

Paths: the C++ kernels on a CPU, the Triton kernels on a GPU, plain torch anywhere. They share the noise bit by bit and the
rest to fp32 rounding.

Nothing of the mask is saved for backward: the graph holds references to the weight and the logits, and backward draws
the mask again from the `Draw`. So a layer costs the memory of its input, however many layers are alive at once.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from topiarist.masklearn import native
from topiarist.masklearn.candidates import candidates
from topiarist.masklearn.relax import Bernoulli, Categorical, TopN
from topiarist.masklearn.relaxation import Draw, Relaxation

CHUNK = 1 << 18  # logits a plain-torch pass works on at once on a CPU: temporaries stay in the second-level cache

Sink = Callable[[Tensor, Draw], None]
"""Takes d loss / d(W * M) of a layer in place of the logits' gradient; see `masked_linear`."""


@torch.no_grad()
def effective(
    relaxation: Relaxation,
    weight: Float[Tensor, "out in"],
    logits: Float[Tensor, "out classes groups"],
    draw: Draw | None,
) -> Float[Tensor, "out in"]:
    """W * M in the weight's dtype: the mask of `draw`, or the hard mask if it is None (no noise). No autograd."""
    hard = draw is None or draw.straight_through
    if (isinstance(relaxation, Categorical) or not hard) and native_fits(relaxation, weight, logits):
        out = torch.empty_like(weight)
        native.forward(native_mask(relaxation, weight, logits, draw, hard=hard), out)
        return out
    if draw is not None and not hard and _triton_fits(relaxation, weight, logits):
        from topiarist.masklearn import triton_kernel

        return triton_kernel.forward(relaxation, weight, logits, draw)
    if draw is None:
        return relaxation.effective(weight, logits, None)
    with torch.autocast(weight.device.type, enabled=False):  # of a caller's forward: sums over classes stay in fp32
        parts = [
            relaxation.effective(weight[rows], logits[rows].float(), part)
            for rows, part in _chunks(relaxation, logits, draw)
        ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def gradient(
    relaxation: Relaxation,
    weight: Float[Tensor, "out in"],
    logits: Float[Tensor, "out classes groups"],
    grad_effective: Float[Tensor, "out in"],
    draw: Draw,
) -> Float[Tensor, "out classes groups"]:
    """dpi in fp32 for d loss / d(W * M), the regulariser's share included."""
    grad_effective = grad_effective.contiguous()
    if native_fits(relaxation, weight, logits, grad_effective):
        out = torch.empty(logits.shape, dtype=torch.float32)
        native.backward(native_mask(relaxation, weight, logits, draw, push=True), native_grad(grad_effective), out)
        return out
    if _triton_fits(relaxation, weight, logits):
        from topiarist.masklearn import triton_kernel

        return triton_kernel.backward(relaxation, weight, logits, grad_effective, draw)
    parts = [
        relaxation.gradient(weight[rows], logits[rows].float(), grad_effective[rows], part)
        for rows, part in _chunks(relaxation, logits, draw)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _triton_fits(relaxation: Relaxation, *tensors: Shaped[Tensor, "..."]) -> bool:
    """Whether the Triton kernels know this relaxation and take these tensors: contiguous, on a GPU (anywhere if
    interpreted), fp32 or bf16.
    """
    place = tensors[0].is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    fits = all(t.dtype in (torch.float32, torch.bfloat16) and t.is_contiguous() for t in tensors)
    return type(relaxation) in KINDS and place and fits and importlib.util.find_spec("triton") is not None


KINDS: dict[type[Relaxation], int] = {Categorical: 0, TopN: 1, Bernoulli: 2}


def native_fits(relaxation: Relaxation, *tensors: Shaped[Tensor, "..."]) -> bool:
    """Whether the C++ kernels know this relaxation and take these tensors."""
    return type(relaxation) in KINDS and native.usable(*tensors)


def native_mask(
    relaxation: Relaxation,
    weight: Float[Tensor, "out in"],
    logits: Float[Tensor, "out classes groups"],
    draw: Draw | None,
    *,
    hard: bool = False,
    push: bool = False,
) -> native.Mask:
    """The C++ kernel's arguments for one layer and draw. `push`: for a backward pass, so with Bernoulli's density penalty,
    which needs the mean of the whole mask first.
    """
    table = candidates(relaxation.pattern) if isinstance(relaxation, Categorical) else torch.empty(0, dtype=torch.bool)
    draw_or_plain = draw or Draw((0, 0), 1.0, 1.0)
    mask = native.mask_args(
        weight, logits, table, kappa=draw_or_plain.kappa, tau=draw_or_plain.tau,
        lam=draw_or_plain.lam, key=draw_or_plain.key, first_row=draw_or_plain.first_row,
        first_group=draw_or_plain.first_group, noise=draw is not None, hard=hard, kind=KINDS[type(relaxation)],
        keep=relaxation.pattern.keep if isinstance(relaxation, TopN) else 0,
    )  # fmt: skip
    if push and isinstance(relaxation, Bernoulli):
        mask.push = relaxation.push(native.forward(mask, None), draw_or_plain)
    return mask


def native_grad(grad_effective: Float[Tensor, "out in"]) -> native.Adam:
    """The C++ kernel's arguments for a backward pass without an optimiser step."""
    adam = native.Adam(grad_effective=grad_effective.data_ptr(), grad_bf16=grad_effective.dtype == torch.bfloat16)
    adam.keep_alive = grad_effective
    return adam


def _chunks(relaxation: Relaxation, logits: Tensor, draw: Draw):
    """(rows, their Draw), so that a plain pass on a CPU works in cache; everything at once elsewhere."""
    rows = logits.shape[0]
    step = max(1, CHUNK // logits[0].numel()) if logits.device.type == "cpu" and relaxation.by_row else rows
    for start in range(0, rows, step):
        yield slice(start, start + step), replace(draw, first_row=draw.first_row + start)


def masked_linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    logits: Float[Tensor, "out classes groups"],
    bias: Float[Tensor, " out"] | None,
    relaxation: Relaxation,
    draw: Draw,
    sink: Sink | None = None,
) -> Float[Tensor, "*batch out"]:
    """x (W * M)^T + bias, differentiable in x and the logits; the weight and the bias are frozen.

    With a `sink`, backward hands it d loss / d(W * M) and leaves the logits without a gradient: an optimiser that folds
    the conversion into its step (optim.py) then needs one value per weight where logits.grad has 1.5 at 2:4.
    """
    return _MaskedLinear.apply(x, weight, logits, bias, relaxation, draw, sink)


def effective_weight(
    weight: Float[Tensor, "out in"],
    logits: Float[Tensor, "out classes groups"],
    relaxation: Relaxation,
    draw: Draw,
    sink: Sink | None = None,
) -> Float[Tensor, "out in"]:
    """W * M as a tensor, differentiable in the logits: for modules that use their weight themselves (experts)."""
    return _EffectiveWeight.apply(weight, logits, relaxation, draw, sink)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, logits, bias, relaxation, draw, sink):
        ctx.save_for_backward(x, weight, logits)
        ctx.how = relaxation, draw, sink
        return F.linear(x, effective(relaxation, weight, logits, draw), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, weight, logits = ctx.saved_tensors
        relaxation, draw, sink = ctx.how
        dx = dpi = None
        if ctx.needs_input_grad[0]:  # under autocast the products are in the output's dtype, as those of a linear are
            dx = (grad_out @ effective(relaxation, weight, logits, draw).to(grad_out.dtype)).to(x.dtype)
        if ctx.needs_input_grad[2]:
            rows_out, rows_in = (t.reshape(-1, t.shape[-1]) for t in (grad_out, x))
            grad_effective = rows_out.T @ rows_in.to(grad_out.dtype)
            dpi = _deliver(relaxation, weight, logits, grad_effective, draw, sink)
        return dx, None, dpi, None, None, None, None


class _EffectiveWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, logits, relaxation, draw, sink):
        ctx.save_for_backward(weight, logits)
        ctx.how = relaxation, draw, sink
        return effective(relaxation, weight, logits, draw)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_effective):
        weight, logits = ctx.saved_tensors
        relaxation, draw, sink = ctx.how
        return None, _deliver(relaxation, weight, logits, grad_effective, draw, sink), None, None, None


def _deliver(relaxation, weight, logits, grad_effective, draw, sink) -> Tensor | None:
    if sink is not None:
        sink(grad_effective, draw)
        return None
    return gradient(relaxation, weight, logits, grad_effective, draw).to(logits.dtype)
