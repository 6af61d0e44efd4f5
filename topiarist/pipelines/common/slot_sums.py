"""Sums over the tokens of all processes that are no Grams: which windows a process has, and products summed by slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from topiarist.core.slots import PairwiseSum, slot_batches
from topiarist.pipelines.training.processes import Processes


@dataclass(frozen=True)
class WindowShare:
    """The windows that this process has among those of all."""

    num: int
    """Windows of all processes."""
    slots: Sequence[range]
    """Windows of this process' slots, counted among those of all."""
    processes: Processes = field(default_factory=Processes)

    @classmethod
    def whole(cls, num: int) -> WindowShare:
        """All windows, in one process."""
        return cls(num, slot_batches(num, 0, 1))

    def rows(self, windows: range) -> list[slice]:
        """Which of this process' windows are among `windows` of all, slot by slot."""
        first = self.slots[0].start
        bounds = [(max(s.start, windows.start) - first, min(s.stop, windows.stop) - first) for s in self.slots]
        return [slice(start, max(start, stop)) for start, stop in bounds]

    def having(self, windows: range) -> list[bool]:
        """Which processes have any of `windows`."""
        return self.processes.gather(any(rows.stop > rows.start for rows in self.rows(windows)))


class ProductSum:
    """C, the sum over tokens of y x^T, slot by slot."""

    def __init__(self, like: Float[Tensor, "out in"]) -> None:
        self._like, self._slot = like, None
        self._sums = PairwiseSum()

    def add(self, y: Float[Tensor, "tokens out"], x: Float[Tensor, "tokens in"]) -> None:
        """Add some tokens' outputs times their inputs."""
        self._slot = torch.zeros_like(self._like) if self._slot is None else self._slot
        self._slot.addmm_(y.T, x)

    def end_of_slot(self) -> None:
        """Move the sum of a slot's tokens to where slots are added pairwise."""
        self._sums.push(self._slot)
        self._slot = None

    def of_all(self, processes: Processes, owner: int, having: Sequence[bool]) -> Float[Tensor, "out in"] | None:
        """The sum over the tokens of all processes, in its owner; None elsewhere. having: the processes with tokens."""
        own = self._sums.total
        flat_sum = None if own is None else own.flatten()
        total = processes.add_pairwise(flat_sum, owner, self._like.numel(), self._like.device, having)
        return None if total is None else total.view(self._like.shape)
