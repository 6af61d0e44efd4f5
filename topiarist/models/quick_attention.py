"""Causal attention in 16 bits on the CPU, where PyTorch's own kernel does not use the processor's 16-bit products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from topiarist.core.linalg import search_dtype
from topiarist.models.attention import WATCHED

BLOCK = 64
"""Queries at once: few, so that a block's scores stay in the cache and few later keys are looked at in vain."""


@contextmanager
def quick_attention() -> Iterator[None]:
    """Let plain causal attention in bf16 on the CPU run as blocks of matrix products inside: for trainings.

    On a processor that multiplies bf16, that is about three times as fast as PyTorch's kernel, forward and backward. Scores
    are rounded to bf16, as transformers' eager attention rounds them and PyTorch's kernel does not: what is measured or
    pruned is left to the latter. The softmax is fp32. What has a mask, dropout or other queries than keys goes the usual
    way; so does everything where the processor has no such products.
    """
    if search_dtype(torch.device("cpu")) != torch.bfloat16:
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual = ALL_ATTENTION_FUNCTIONS[WATCHED]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any) -> Any:
        causal = settings.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        more = {name for name, value in settings.items() if value is not None} & {"position_bias", "softcap", "cache"}
        plain = mask is None and causal is True and not more and not settings.get("dropout")
        if not plain or query.device.type != "cpu" or query.dtype != torch.bfloat16 or query.shape[2] != key.shape[2]:
            return usual(module, query, key, value, mask, **settings)
        scaling = settings.get("scaling")
        return causal_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None

    ALL_ATTENTION_FUNCTIONS[WATCHED] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[WATCHED] = usual


def causal_attention(
    query: Float[Tensor, "batch heads tokens size"],
    key: Float[Tensor, "batch kv_heads tokens size"],
    value: Float[Tensor, "batch kv_heads tokens value_size"],
    scaling: float,
) -> Float[Tensor, "batch tokens heads value_size"]:
    """Attend to no later token; a group of consecutive heads shares a key. Backward computes the scores again."""
    return _Causal.apply(query, key, value, scaling)  # pyright: ignore


class _Causal(torch.autograd.Function):
    """Heads that share a key are rows of one product. Keys' and values' gradients are summed over blocks in fp32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        (batch, heads, tokens, _), groups = query.shape, key.shape[1]
        out = query.new_empty(batch, tokens, groups, heads // groups, value.shape[-1])
        values = value.flatten(0, 1)
        for start, end, _, shares in _blocks(query, key, scaling):
            found = torch.bmm(shares, values[:, :end]).view(batch, groups, heads // groups, end - start, -1)
            out[:, start:end] = found.permute(0, 3, 1, 2, 4)
        return out.flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        (batch, heads, tokens, size), groups = query.shape, key.shape[1]
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        of_query = query.new_empty(batch, groups, heads // groups, tokens, size)
        of_keys, of_values = torch.zeros(keys.shape), torch.zeros(values.shape)
        for start, end, queries, shares in _blocks(query, key, ctx.scaling):
            wanted = upstream[:, start:end].unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
            wanted = wanted.reshape(batch * groups, -1, values.shape[-1])
            of_values[:, :end] += torch.bmm(shares.mT, wanted)
            of_shares = torch.bmm(wanted, values[:, :end].mT)
            of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype).mul_(ctx.scaling)
            found = torch.bmm(of_scores, keys[:, :end])
            of_query[:, :, :, start:end] = found.view(batch, groups, heads // groups, end - start, size)
            of_keys[:, :end] += torch.bmm(of_scores.mT, queries)
        return (
            of_query.flatten(1, 2),
            of_keys.view(key.shape).to(key.dtype),
            of_values.view(value.shape).to(value.dtype),
            None,
        )


def _blocks(query: Tensor, key: Tensor, scaling: float) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(start, end, queries, shares) a block: what each of its queries gives to each of the first `end` keys.

    queries: (batch * kv_heads, heads a group * (end - start), size). shares: the same rows, `end` columns.
    """
    keys = key.flatten(0, 1)
    later = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)
    for start in range(0, query.shape[2], BLOCK):
        end = min(start + BLOCK, query.shape[2])
        size = end - start
        queries = query[:, :, start:end].reshape(len(keys), -1, query.shape[-1])
        scores = torch.bmm(queries, keys[:, :end].mT).mul_(scaling)
        own = scores.view(len(keys), -1, size, end)[..., start:]
        own.masked_fill_(later[:size, :size], float("-inf"))
        yield start, end, queries, scores.softmax(-1)
