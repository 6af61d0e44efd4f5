"""Token sequences in an order that depends on the seed alone, and a step's gradients from its micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topiarist.core.errors import CalibrationError, UnsupportedModel
from topiarist.pipelines.training.processes import Processes

MicroBatch = TypeVar("MicroBatch")


class Batches:
    """Rows of a token table, epoch after epoch, each epoch in an order of its own that depends on the seed alone.

    num: rows of the table. size: rows a step. Raises CalibrationError if the table holds less than one step.
    """

    def __init__(self, num: int, size: int, seed: int) -> None:
        if num < size:
            raise CalibrationError(f"training text holds {num} sequences, a step needs {size}: add text")
        self.num, self.size, self.seed = num, size, seed
        self._epoch, self._order = -1, torch.empty(0)

    def rows(self, step: int) -> list[int]:
        """Return the rows of one step."""
        return [self._row(position) for position in range(step * self.size, (step + 1) * self.size)]

    def micro_batches(self, step: int, size: int) -> list[list[int]]:
        """Return the rows of one step in micro-batches of at most `size` rows."""
        rows = self.rows(step)
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, self.num)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.num, generator=generator)
        return int(self._order[place])


def check_sequences(sequences: int, processes: int, cure: str) -> None:
    """Raise CalibrationError, with a number that can, unless the processes can divide the sequences of a step.

    cure: what else would help.
    """
    if sequences % processes:
        fit = max(number for number in range(1, processes) if sequences % number == 0)
        raise CalibrationError(
            f"{sequences} sequences a step cannot be divided among {processes} processes: start {fit}, or {cure}"
        )


def micro_batch_size(sequences: int, most: int) -> int:
    """The largest micro-batch up to `most` that divides a step evenly: the mean of their losses is then the step's."""
    return next(size for size in range(min(sequences, most), 0, -1) if sequences % size == 0)


def accumulate_gradients(
    micro_batches: Sequence[MicroBatch],
    loss: Callable[[MicroBatch], Float[Tensor, ""]],
    processes: Processes,
    device: torch.device,
    *,
    after_backward: Callable[[], None] = lambda: None,
) -> Float[Tensor, ""]:
    """Run forward and backward of this process' share of a step's micro-batches.

    loss: of one micro-batch, a mean. Gradients are those of the mean over all micro-batches, of this process' share
    only: the caller sums them over processes. Returns the mean loss over all processes, detached.
    """
    total = torch.zeros((), device=device)
    for index in range(processes.rank, len(micro_batches), processes.size):
        share = loss(micro_batches[index]) / len(micro_batches)
        if not share.requires_grad:
            raise UnsupportedModel(
                "the loss has no gradient: the model's own code cuts it off from the weights, so it can be pruned but not "
                "trained"
            )
        share.backward()
        after_backward()
        total += share.detach()
    return processes.all_reduce(total)


def held_out_count(share: float, num: int) -> int:
    """How many of `num` a share above 0 holds out: at least one, and one is left to train on; of a single one, none."""
    return min(max(1, round(share * num)), num - 1) if share > 0 and num > 1 else 0


@torch.no_grad()
def held_out_mean(
    num: int,
    loss: Callable[[int], Float[Tensor, ""]],
    processes: Processes,
    device: torch.device,
    *,
    in_step: bool = False,
) -> float:
    """Mean of `loss(row)` over `num` held-out rows, divided among the processes.

    in_step: every process runs as many forwards as the others, because their models are shards of one.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for first in range(0, num, processes.size):
        index = first + processes.rank
        if index >= num and not in_step:
            break
        value = loss(min(index, num - 1)).double()
        total += value if index < num else 0.0
    return float(processes.all_reduce(total)) / num


def split_held_out(num: int, held_out: int) -> tuple[Bool[Tensor, " num"], Bool[Tensor, " num"]]:
    """(training, held-out) sequences of `num`, at most a tenth of them held out, spread evenly so that they resemble the rest.

    Raises CalibrationError if there are too few to hold any out.
    """
    count = min(held_out, max(1, num // 10))
    if count < 1 or num <= count:
        raise CalibrationError(
            f"training text holds {num} sequences: too few to train on some and hold others out: add text"
        )
    chosen = torch.zeros(num, dtype=torch.bool)
    chosen[[(2 * i + 1) * num // (2 * count) for i in range(count)]] = True
    return ~chosen, chosen
