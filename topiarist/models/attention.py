"""How much attention every token is given, seen where transformers computes attention; no modelling code is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

SCORES = 1 << 24
"""Attention scores in memory at once: 64 MB."""
WATCHED = "sdpa"
"""The one implementation that is watched; families without it are not seen."""


@contextmanager
def watch_attention(on_received: Callable[[Float[Tensor, "batch tokens"]], None]) -> Iterator[None]:
    """Call `on_received(received)` after every attention, with what each token was given: summed over the queries, in the mean
    of the heads, so 1 on average where all tokens attend.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS[WATCHED]

    def watching(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any) -> Any:
        out = attend(module, query, key, value, mask, **settings)
        causal = settings.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        scaling = settings.get("scaling") or query.shape[-1] ** -0.5
        on_received(received_attention(query, key, mask, scaling=scaling, causal=bool(causal)))
        return out

    ALL_ATTENTION_FUNCTIONS[WATCHED] = watching
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[WATCHED] = attend


@torch.no_grad()
def received_attention(
    query: Float[Tensor, "batch heads queries size"],
    key: Float[Tensor, "batch kv_heads tokens size"],
    mask: Shaped[Tensor, "rows some queries all"] | None,
    *,
    scaling: float,
    causal: bool,
) -> Float[Tensor, "batch tokens"]:
    """The attention that each token is given, summed over the queries, in the mean of the heads.

    mask: as scaled_dot_product_attention takes it, (batch or 1, heads or 1, queries, tokens), booleans or what is added to the
    scores; without one, a query attends to no later token if `causal`. scaling: of the scores.
    """
    (batch, heads, queries, _), (kv_heads, tokens) = query.shape, key.shape[1:3]
    received = torch.zeros(batch, tokens, device=query.device)
    later = None
    if mask is None and causal and queries > 1:
        later = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).triu(1 + tokens - queries)
    together = max(1, SCORES // (queries * tokens))
    for row in range(batch):
        for first in range(0, heads, together):
            some = range(first, min(first + together, heads))
            of_keys = [head * kv_heads // heads for head in some]
            scores = (query[row, some.start : some.stop].float() @ key[row, of_keys].float().mT) * scaling
            if later is not None:
                scores.masked_fill_(later, float("-inf"))
            elif mask is not None:
                those = mask[row if len(mask) > 1 else 0]
                those = those[some.start : some.stop] if len(those) > 1 else those
                if those.dtype == torch.bool:
                    scores.masked_fill_(~those[..., :tokens], torch.finfo(scores.dtype).min)
                else:
                    scores += those[..., :tokens].float()
            received[row] += scores.softmax(-1).sum((0, 1))
    return received / heads
