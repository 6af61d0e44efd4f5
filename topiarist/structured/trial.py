"""What a choice of units costs on text: the loss of the gated model on some windows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from topiarist.errors import CalibrationError
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


def window_losses(model: nn.Module, tokens: Int[Tensor, "batch window"]) -> Float[Tensor, " batch"]:
    """Mean next-token loss of every window, fp32."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(1)


@torch.inference_mode()
def gated_loss(task: Task, masks: Masks, wanted: Mapping[str, Tensor], tokens: Int[Tensor, "num window"]) -> float:
    """Mean loss of the model inside `gates`, whose masks are set to `wanted` first."""
    device = task.model.device
    masks.update({key: mask.to(device, torch.float32) for key, mask in wanted.items()})
    losses = [window_losses(task.model, batch.to(device)) for batch in tokens.split(task.batch_size)]
    return float(torch.cat(losses).double().mean())


def chosen(task: Task, scores: Scores) -> Kept:
    """The units that these scores keep, as the pipeline will choose them."""
    return choose(task.groups, scores, task.keep, scope=task.scope, counts=task.counts, round_to=task.round_to)
