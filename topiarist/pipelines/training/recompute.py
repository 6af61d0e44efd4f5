"""Activation checkpointing: a block keeps its input alone and runs again in backward; a third more time, far less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from topiarist.models.opened import OpenedModel


def blocks_of(model: OpenedModel) -> list[nn.Module]:
    """The decoder blocks, first to last."""
    return [model.block(index) for index in range(len(model.block_names))]


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that keeps nothing but its inputs for backward. Nothing random may happen in it."""

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return checkpointed


@contextmanager
def wrapping(blocks: Sequence[nn.Module], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Every block's forward is what `wrap` makes of it while inside."""
    given = [vars(block).get("forward") for block in blocks]  # of an object that was given one beside its class's
    for block in blocks:
        block.forward = wrap(block.forward)
    try:
        yield
    finally:
        for block, own in zip(blocks, given, strict=True):
            del block.forward  # the class's own shows again
            if own is not None:
                block.forward = own


@contextmanager
def recomputing(blocks: Sequence[nn.Module], wanted: bool = True) -> Iterator[None]:
    """Let every block recompute its activations in backward while inside."""
    with wrapping(blocks if wanted else (), recomputed):
        yield
