"""How long a forward of a model takes here, as one window through its first block and through its head tells."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from topiarist.core.losses import next_token_losses
from topiarist.models.opened import OpenedModel, at_rest
from topiarist.pipelines.common.stream import BlockStream

ROWS = 4096
"""Of the vocabulary that the probe of the head takes."""


@torch.no_grad()
def window_seconds(source: OpenedModel, window: Int[Tensor, "1 window"]) -> float:
    """Seconds that a window takes through all blocks and the head, losses included, when its weights are in memory.

    Raises what BlockStream raises for a model whose blocks cannot be run on text.
    """
    with at_rest(source.model):
        stream = BlockStream.of(source, window, batch_size=1)
        block = source.load(0)
        of_block = timed(lambda: stream.run_batch(0, block, 0))
        stream.close()
        source.release(0)
        rows, device = min(ROWS, source.vocabulary), source.device
        head = torch.ones(rows, source.text_config.hidden_size, dtype=source.dtype, device=device)
        states, ids = torch.ones_like(head[:1]).expand(window.shape[1], -1), window.to(device) % rows
        of_head = timed(lambda: next_token_losses((states @ head.T)[None], ids))
    return len(source.block_names) * of_block + of_head * source.vocabulary / rows


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes the second time: the first one warms up."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
