"""The arithmetic of one step of AdamW on logits, in one pass: see optim.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from topiarist.masklearn import eight_bit, native, noise


@dataclass(frozen=True)
class Step:
    """The numbers of one AdamW step on one layer."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    count: int
    """Which step this is, from 1: corrects the moments for their start at zero."""
    moment_key: noise.Key
    logit_key: noise.Key
    share: int = 0
    """Second moment per logit (0), per group (1) or per row (2)."""


def native_adam(
    step: Step,
    scale: float | Float[Tensor, ""],
    m: Float[Tensor, "out classes groups"],
    v: Float[Tensor, "..."],
    grad_effective: Float[Tensor, "out in"],
) -> native.Adam:
    """Give the step as the C++ kernel takes it. scale: of the gradient. m, v: moments, as `MaskAdamW` keeps them."""
    adam = native.Adam(
        grad_effective=grad_effective.data_ptr(), grad_bf16=grad_effective.dtype == torch.bfloat16,
        m=m.data_ptr(), v=v.data_ptr(), moments_bf16=m.dtype == torch.bfloat16, share=step.share,
        lr=step.lr, beta1=step.beta1, beta2=step.beta2, eps=step.eps, decay=step.weight_decay,
        correction1=1.0 - step.beta1**step.count, correction2=1.0 - step.beta2**step.count, scale=float(scale),
        key0=step.moment_key[0] & 0xFFFFFFFF, key1=step.moment_key[1] & 0xFFFFFFFF,
        key2=step.logit_key[0] & 0xFFFFFFFF, key3=step.logit_key[1] & 0xFFFFFFFF,
    )  # fmt: skip
    adam.keep_alive = (grad_effective, m, v)
    return adam


def adamw_(
    logits: Float[Tensor, "out classes groups"],
    grad: Float[Tensor, "out classes groups"],
    m: Float[Tensor, "out classes groups"],
    v: Float[Tensor, "..."],
    step: Step,
    *,
    first_row: int = 0,
    first_group: int = 0,
) -> None:
    """One AdamW step in place, in plain torch: the oracle of the C++ kernel. Shapes as in `MaskAdamW`; grad fp32."""
    where = {"first_row": first_row, "first_group": first_group, "device": logits.device}
    words = noise.bits(step.moment_key, *logits.shape, **where)
    m_new = step.beta1 * _read(m) + (1.0 - step.beta1) * grad
    squares = grad.square()
    if step.share:
        squares = squares.mean(1) if step.share == 1 else squares.mean((1, 2))
    before = _read(v).square() if eight_bit.quantised(v) else v.float()
    v_new = step.beta2 * before + (1.0 - step.beta2) * squares
    denominator = (v_new / (1.0 - step.beta2**step.count)).sqrt_().add_(step.eps)
    if step.share:
        denominator = denominator[:, None, :] if step.share == 1 else denominator[:, None, None]
    update = m_new / (1.0 - step.beta1**step.count) / denominator
    new = logits.float() * (1.0 - step.lr * step.weight_decay) - step.lr * update
    _write(m, m_new, words)
    _write(v, v_new.sqrt() if eight_bit.quantised(v) else v_new, words >> 16)
    _write(logits, new, noise.bits(step.logit_key, *logits.shape, **where))


def _read(moment: Tensor) -> Tensor:
    return moment.dequantize() if eight_bit.quantised(moment) else moment.float()


def _write(target: Tensor, value: Tensor, words: Tensor) -> None:
    """Store fp32 as it is, as eight-bit codes, or in bf16 rounded stochastically: 16 random bits added below the last bit
    that is kept.
    """
    if target.dtype == torch.float32:  # codes pass for fp32, and take it
        target.copy_(value)
        return
    bits = value.contiguous().view(torch.int32)
    rounded = (bits + (words & 0xFFFF)) & -0x10000
    target.copy_(torch.where(value.isnan(), value, rounded.view(torch.float32)))
