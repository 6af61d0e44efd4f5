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
def recomputing(blocks: Sequence[nn.Module], wanted: bool = True) -> Iterator[None]:
    """Let every block recompute its activations in backward while inside."""
    for block in blocks if wanted else ():
        block.forward = recomputed(block.forward)
    try:
        yield
    finally:
        for block in blocks if wanted else ():
            del block.forward  # the class's own shows again
