"""Which way the blocks of an opened model can be run, found once."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from topiarist.models.calls import BlockCall, Flow, probe_flow
from topiarist.models.opened import OpenedModel


@torch.no_grad()
def flow_of(source: OpenedModel, tokens: Int[Tensor, "1 window"]) -> Flow:
    """How hidden states go through the blocks; needs the embeddings and a block of each class, which it loads.

    Raises UnsupportedModel for a block that is called twice a forward.
    """
    if source.flow is None:

        def real(index: int, call: BlockCall) -> Any:
            block = source.load(index)
            keyword = {} if call.keyword is None else {call.keyword: call.hidden}
            args = call.args if keyword else (call.hidden, *call.args)
            output = block(*args, **keyword, **call.kwargs)
            if index:
                source.release(index)
            return output

        source.load_embeddings()
        source.flow = probe_flow(source.model, source.family, tokens.to(source.device), real)
    return source.flow
