"""What predictions lose: token by token against the text, or against another model's predictions.

Logits are wide and of 16 bits. A few rows at a time become fp32 here, in the same memory, so that all steps on them find
them in the cache and no fp32 copy of the whole exists: 0.2 GB for 1,024 tokens of a 49,152-word vocabulary, for every
step that keeps one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

ROWS, ROWS_GPU = 8, 256
"""A few megabytes of fp32 on the CPU; on a GPU the launches count, not the cache."""


@torch.no_grad()
def next_token_losses(
    logits: Float[Tensor, "batch window vocabulary"], tokens: Int[Tensor, "batch window"]
) -> Float[Tensor, "batch window-1"]:
    """Loss of every token but the first of its window, in nats, fp32. No gradient."""
    wanted = F.pad(tokens[:, 1:], (0, 1)).flatten()  # the last position predicts nothing; its loss is dropped
    losses = torch.empty(len(wanted), device=logits.device)
    for rows, (own,) in _log_softmax(logits.flatten(0, 1)):
        losses[rows] = -own.gather(1, wanted[rows, None])[:, 0]
    return losses.view(tokens.shape)[:, :-1]


def next_token_loss(
    logits: Float[Tensor, "batch window vocabulary"], tokens: Int[Tensor, "batch window"]
) -> Float[Tensor, ""]:
    """Mean loss of all tokens but the first of their window, in nats, fp32; the gradient is of the logits' dtype."""
    return _NextToken.apply(logits, tokens)  # pyright: ignore


def divergence(
    logits: Float[Tensor, "*positions vocabulary"], reference: Float[Tensor, "*positions vocabulary"]
) -> Float[Tensor, ""]:
    """Mean over positions of KL(reference || logits) in nats, fp32; the gradient goes to `logits` alone, in its dtype."""
    return _Divergence.apply(logits.flatten(0, -2), reference.flatten(0, -2))  # pyright: ignore


class _WithGrad(torch.autograd.Function):
    """A loss of logits whose forward leaves its gradient in ctx.gradient: it is made of what the loss has just computed."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None]:
        return (None if ctx.gradient is None else ctx.gradient * upstream), None


class _NextToken(_WithGrad):
    """Gradient: (softmax(logits) - one_hot(target)) / tokens, and 0 at the last position of a window."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        targets = F.pad(tokens[:, 1:], (0, 1)).flatten()[:, None]
        counts = F.pad(torch.ones_like(tokens[:, 1:]), (0, 1)).flatten()[:, None] / tokens[:, 1:].numel()
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        ctx.gradient = grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for rows, (own,) in _log_softmax(logits.flatten(0, 1)):
            found = own.gather(1, targets[rows])
            total -= (found * counts[rows]).double().sum()
            if grad is not None:
                own.exp_().scatter_add_(1, targets[rows], torch.full_like(found, -1.0))
                grad.view(-1, grad.shape[-1])[rows] = own.mul_(counts[rows])
        return total.float()


class _Divergence(_WithGrad):
    """Gradient: (softmax(logits) - softmax(reference)) / positions."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        ctx.gradient = grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for rows, (own, wanted) in _log_softmax(logits, reference):
            probabilities = wanted.exp()
            total += wanted.sub_(own).mul_(probabilities).sum(-1).double().sum()
            if grad is not None:
                grad[rows] = own.exp_().sub_(probabilities).div_(len(logits))
        return (total / len(logits)).float()


def _log_softmax(*logits: Float[Tensor, "n vocabulary"]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Some rows after the other: which, and their log softmax in each of `logits`, fp32, overwritten by the next."""
    count, width = logits[0].shape
    step = min(max(count, 1), ROWS if logits[0].device.type == "cpu" else ROWS_GPU)
    work = torch.empty(1 + len(logits), step, width, device=logits[0].device)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        scores, *found = work[:, : rows.stop - start].unbind()
        for out, source in zip(found, logits, strict=True):
            torch.log_softmax(scores.copy_(source[rows]), -1, out=out)
        yield rows, found
