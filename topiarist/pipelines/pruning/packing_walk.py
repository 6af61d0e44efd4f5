"""The walk of a run whose solver is a `Quantized`: finished blocks are written as compressed-tensors packs them."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor, nn

from topiarist.checkpoints.dequantised import DequantisedCheckpoint
from topiarist.checkpoints.reading import Checkpoint
from topiarist.checkpoints.writing import OutputFolder
from topiarist.pipelines.common.integer_blocks import head_name, packed_block, packed_head
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
        folder, stem = self.source.as_folder(), f"{self.names[index]}."
        weights = {name.removeprefix(stem): solution.quantized for name, solution in self.solutions.items()}
        block = packed_block(folder, index, weights)
        # The head is written with the last block: one journal line a block, and the head is small beside one.
        return block | packed_head(folder) if self.head and index + 1 == len(self.names) else block

    def _left_out(self) -> Container[str]:
        return {f"{head_name(self.source.as_folder())}.weight"} if self.head else ()

    def _finished(self, output: OutputFolder, line: Mapping[str, Any]) -> Checkpoint:
        return DequantisedCheckpoint.of_packed(output.block(line), self.source.dtype)
