"""What a choice of units costs on text: the loss of the gated model on some windows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from topiarist.core.errors import CalibrationError, UnsupportedModel
from topiarist.core.losses import next_token_losses
from topiarist.models.derive import family_of
from topiarist.models.hooks import EndForward, StandIn, hooked
from topiarist.models.opened import ObjectModel
from topiarist.models.probe import flow_of
from topiarist.structured.choose import choose
from topiarist.structured.gates import Masks
from topiarist.structured.methods import Scores, Task
from topiarist.structured.units import Kept


def short_windows(tokens: Int[Tensor, "num long"], window: int) -> Int[Tensor, "more window"]:
    """Windows cut into shorter ones of `window` tokens, or as they are if they are no longer than that."""
    window = min(window, tokens.shape[1])
    whole = tokens.shape[1] // window * window
    return tokens[:, :whole].reshape(-1, window)


def split(tokens: Int[Tensor, "num window"], held_out: int) -> tuple[Tensor, Tensor]:
    """(windows to work with, held-out windows): the last ones, at most a quarter. Raises CalibrationError if too few."""
    held_out = min(held_out, len(tokens) // 4)
    if held_out < 1:
        raise CalibrationError(
            f"{len(tokens)} calibration windows of {tokens.shape[1]} tokens are too few to hold some out; use 4 or more"
        )
    return tokens[:-held_out], tokens[-held_out:]


@torch.inference_mode()
def gated_loss(task: Task, masks: Masks, wanted: Mapping[str, Tensor], tokens: Int[Tensor, "num window"]) -> float:
    """Mean loss of the model inside `gates`, whose masks are set to `wanted` first."""
    device = task.model.device
    masks.update({key: mask.to(device, torch.float32) for key, mask in wanted.items()})
    batches = (batch.to(device) for batch in tokens.split(task.batch_size))
    losses = [next_token_losses(task.model(input_ids=b, use_cache=False).logits, b).mean(1) for b in batches]
    return float(torch.cat(losses).double().mean())


def chosen(task: Task, scores: Scores) -> Kept:
    """The units that these scores keep, as the pipeline will choose them."""
    return choose(task.groups, scores, task.keep, scope=task.scope, counts=task.counts, round_to=task.round_to)


class Prefix:
    """Forwards of the same tokens that begin at a later and later block: what stands before it is computed once.

    Whole forwards where a block needs more of earlier ones than hidden states, keys and values that it shares with them say.
    A context: inside, the model is good for these tokens only; on leaving it is as it was.
    """

    def __init__(self, model: Any, tokens: Int[Tensor, "batch window"]) -> None:
        self._model, self._tokens = model, tokens
        self._blocks: nn.ModuleList = model.get_submodule(family_of(model).blocks)
        self._originals = list(self._blocks)
        self._start = 0
        try:
            with torch.inference_mode():
                self._replays = flow_of(ObjectModel(model), tokens[:1]).replays
        except UnsupportedModel:  # blocks that run twice
            self._replays = False

    @torch.inference_mode()
    def begin_at(self, block: int) -> None:
        """Run the blocks up to this one, as they are now, for the last time."""
        if block < self._start:
            raise ValueError(f"block {block} lies before {self._start}, where forwards begin")
        if block == self._start or not self._replays:
            return
        reached: list[Any] = []

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            reached.append(output)
            raise EndForward

        with hooked(self._originals[block - 1].register_forward_hook(leave)), suppress(EndForward):
            self._model(input_ids=self._tokens, use_cache=False)
        for index in range(block):
            self._blocks[index] = StandIn(self._originals[index], lambda *_, **__: reached[0])
        self._start = block

    def __enter__(self) -> Prefix:
        return self

    def __exit__(self, *_: object) -> None:
        for index, block in enumerate(self._originals):
            self._blocks[index] = block
