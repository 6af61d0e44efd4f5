"""What a recovery minimises: distance to the dense model's predictions and hidden states, or the text's own loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from topiarist.core.losses import divergence, next_token_loss
from topiarist.models.hooks import hooked
from topiarist.pipelines.training.batches import held_out_mean
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.text import Sequences

Hidden = list[Float[Tensor, "batch window width"]]


class Objective:
    """The loss of a student on rows of token tables; the teacher's logits are computed on the fly.

    hidden_weight: of the hidden-state term, None for none. With a teacher the loss is KL(teacher || student) in nats, the
    mean over all positions, at temperature 1; without one, next-token loss in nats.

    blocks: (student's, teacher's) whose outputs the hidden-state term compares, pair by pair. shards: the models of all
    processes are one, so that none can run a forward alone.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any | None,
        tokens: Sequences,
        held_out: Int[Tensor, "held window"],
        *,
        blocks: tuple[Sequence[nn.Module], Sequence[nn.Module]] = ((), ()),
        hidden_weight: float | None = None,
        processes: Processes | None = None,
        shards: bool = False,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.tokens, self.held_out = tokens, held_out
        self.blocks, self.hidden_weight = blocks, hidden_weight
        self.processes, self.shards = processes or Processes(), shards
        self.device = next(student.parameters()).device

    def loss(self, rows: Sequence[int]) -> Float[Tensor, ""]:
        """Mean training loss of some training sequences."""
        batch = self.tokens[rows].to(self.device)
        if self.hidden_weight is None:
            return self._predictions(batch)
        with outputs_of(self.blocks[0]) as own, outputs_of(self.blocks[1]) as wanted:
            return self._predictions(batch) + self.hidden_weight * hidden_error(own, wanted)

    def held_out_loss(self) -> float:
        """Mean loss of the predictions on the held-out sequences."""

        def loss(row: int) -> Tensor:
            return self._predictions(self.held_out[row : row + 1].to(self.device))

        return held_out_mean(len(self.held_out), loss, self.processes, self.device, in_step=self.shards)

    def _predictions(self, batch: Int[Tensor, "batch window"]) -> Float[Tensor, ""]:
        if self.teacher is None:
            return next_token_loss(_logits(self.student, batch), batch)
        with torch.no_grad():
            reference = _logits(self.teacher, batch)
        return divergence(_logits(self.student, batch), reference)


def hidden_error(own: Hidden, wanted: Hidden) -> Float[Tensor, ""]:
    """Mean over blocks and sequences of ||own - wanted||^2 / ||wanted||^2.

    SquareHead (Kurtic et al., arXiv 2310.06927, section 3), which divides by the norm over a whole batch; by sequence, the
    loss does not depend on how a step is cut into micro-batches.
    """
    errors = [
        ((a.float() - b.float()).square().sum((1, 2)) / b.float().square().sum((1, 2)).clamp_min(1e-30)).mean()
        for a, b in zip(own, wanted, strict=True)
    ]
    return torch.stack(errors).mean()


@contextmanager
def outputs_of(blocks: Sequence[nn.Module]) -> Iterator[Hidden]:
    """The outputs of `blocks` in the forward that runs inside, one a block."""
    found: Hidden = []

    def note(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    with hooked(*(block.register_forward_hook(note) for block in blocks)):
        yield found


def _logits(model: Any, batch: Int[Tensor, "batch window"]) -> Float[Tensor, "batch window vocabulary"]:
    return model(input_ids=batch, use_cache=False).logits
