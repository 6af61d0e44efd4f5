"""Which way the blocks of an opened model can be run, found once."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from topiarist.core.errors import TopiaristError, UnsupportedModel, first_line
from topiarist.models.calls import BlockCall, Flow, probe_flow
from topiarist.models.hooks import watch_inputs
from topiarist.models.opened import OpenedModel, at_rest


@torch.no_grad()
def flow_of(source: OpenedModel, tokens: Int[Tensor, "1 window"]) -> Flow:
    """How hidden states go through the blocks; needs the embeddings and a block of each class, which it loads.

    Raises UnsupportedModel for a block that is called twice a forward or cannot run here, and for experts that lie
    otherwise than is known of them.
    """
    if source.flow is None:

        def real(index: int, call: BlockCall) -> Any:
            block = source.load(index)
            keyword = {} if call.keyword is None else {call.keyword: call.hidden}
            args = call.args if keyword else (call.hidden, *call.args)
            experts = [matrix for matrix in source.matrices(index) if matrix.expert is not None]
            try:
                with watch_inputs(experts, lambda *_: None):  # refuses experts that lie otherwise than is known of them
                    output = block(*args, **keyword, **call.kwargs)
            except (TopiaristError, torch.OutOfMemoryError):
                raise
            except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError) as error:
                raise UnsupportedModel(
                    f"{source.block_names[index]} cannot run here ({first_line(error)}): mend that, or prune its modules with "
                    "prune_module"
                ) from error
            if index:
                source.release(index)
            return output

        source.load_embeddings()
        with at_rest(source.model):
            source.flow = probe_flow(source.model, source.family, tokens.to(source.device), real)
    return source.flow
