"""Sums whose bits do not depend on who adds what: the calibration windows lie in slots, and slots are added pairwise.

Slot sums a, b, c, ... become ((a + b) + (c + d)) + ...: one process adds the whole tree, two add a half each, and so on.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from topiarist.core.errors import ProcessError

SLOTS = 8
"""A power of two: the largest number of processes that can divide a run."""


def check_slots(num_batches: int, size: int) -> None:
    """Raise ProcessError if `num_batches` batches of windows cannot be divided among `size` processes."""
    if SLOTS % size:
        fit = [str(n) for n in range(1, SLOTS + 1) if SLOTS % n == 0]
        raise ProcessError(
            f"{size} processes cannot divide {SLOTS} slots of windows evenly: start {', '.join(fit[:-1])} or {fit[-1]}"
        )
    if not num_batches:
        raise ProcessError(
            f"without text there is nothing that {size} processes could divide: start one, without torchrun"
        )
    if num_batches < size:
        raise ProcessError(
            f"{num_batches} batches of windows are too few for {size} processes: take more windows, a smaller batch size or "
            "fewer processes"
        )


def slots_of(rank: int, size: int) -> range:
    """The slots of process `rank` of `size`."""
    each = SLOTS // size
    return range(rank * each, (rank + 1) * each)


def slot_batches(num_batches: int, rank: int, size: int) -> list[range]:
    """The batches, of `num_batches`, in each slot of process `rank` of `size`; slots follow one another."""
    return [range(slot * num_batches // SLOTS, (slot + 1) * num_batches // SLOTS) for slot in slots_of(rank, size)]


def added(
    left: Float[Tensor, "*shape"] | None, right: Float[Tensor, "*shape"] | None
) -> Float[Tensor, "*shape"] | None:
    """left + right, in the memory of `left`; None is a sum of nothing."""
    if left is None or right is None:
        return right if left is None else left
    return left.add_(right)


class PairwiseSum:
    """The sum over slots that come one after the other; at most log2(SLOTS) + 1 terms are in memory."""

    def __init__(self, empty: int = 0) -> None:
        """empty: slots that went by before the first term."""
        self._terms: list[tuple[int, Tensor | None]] = []
        """(slots below it, log2; their sum), from left to right in the tree."""
        for _ in range(empty):
            self.push(None)

    def push(self, term: Float[Tensor, "*shape"] | None) -> None:
        """Add the next slot's term, which is used up."""
        level = 0
        while self._terms and self._terms[-1][0] == level:
            term, level = added(self._terms.pop()[1], term), level + 1
        self._terms.append((level, term))

    @property
    def total(self) -> Float[Tensor, "*shape"] | None:
        """The sum; the number of slots so far is a power of two."""
        [(_, total)] = self._terms
        return total
