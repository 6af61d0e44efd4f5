"""The walk of a run whose solver is a `Quantized`: finished blocks are written as compressed-tensors packs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from topiarist.checkpoints.dequantised import DequantisedCheckpoint
from topiarist.checkpoints.reading import Checkpoint
from topiarist.checkpoints.writing import OutputFolder
from topiarist.models.folder import FolderModel
from topiarist.pipelines.common.packed import head_name, packed_block, packed_head
from topiarist.pipelines.common.stream import BlockStream
from topiarist.pipelines.pruning.walk import Walk
from topiarist.solvers import Solution
from topiarist.solvers.quantized import QuantizedSolution


class PackingWalk(Walk):
    """Notes the integers of each block's solutions while it is in memory, for the file. head: the output head packed too."""

    def __init__(self, *given: Any, head: bool = False) -> None:
        super().__init__(*given)
        self.head = head
        self.solutions: dict[str, QuantizedSolution] = {}
        self.pruner.on_solution = self._note

    def _note(self, name: str, solution: Solution) -> None:
        assert isinstance(solution, QuantizedSolution)
        self.solutions[name] = solution

    def _dense_block(self, stream: BlockStream | None, index: int) -> nn.Module:
        self.solutions.clear()
        return super()._dense_block(stream, index)

    def _tensors(self, index: int) -> Mapping[str, Tensor]:
        assert isinstance(self.source, FolderModel)
        stem = f"{self.names[index]}."
        weights = {name.removeprefix(stem): solution.quantized for name, solution in self.solutions.items()}
        block = packed_block(self.source, index, weights)
        # The head is written with the last block: one journal line a block, and the head is small beside one.
        return block | packed_head(self.source) if self.head and index + 1 == len(self.names) else block

    def _outside(self, checkpoint: Checkpoint) -> list[str]:
        assert isinstance(self.source, FolderModel)
        names = super()._outside(checkpoint)
        return [name for name in names if name != f"{head_name(self.source)}.weight"] if self.head else names

    def _finished(self, output: OutputFolder, line: Mapping[str, Any]) -> Checkpoint:
        return DequantisedCheckpoint.of_packed(output.block(line), self.source.dtype)
