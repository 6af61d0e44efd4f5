"""The walk over the blocks of a quantising run: that of pruning, with the masks that are there and packed files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from topiarist.checkpoints.dequantised import DequantisedCheckpoint
from topiarist.checkpoints.reading import Checkpoint
from topiarist.checkpoints.writing import OutputFolder
from topiarist.core.patterns import Pattern
from topiarist.models.folder import FolderModel
from topiarist.pipelines.common.stream import BlockStream
from topiarist.pipelines.pruning.walk import Walk
from topiarist.pipelines.quantizing.packed import head_name, packed_block, packed_head
from topiarist.pipelines.quantizing.report import QuantizedLayer
from topiarist.quantization import QuantizedWeight
from topiarist.results.report import LayerReport
from topiarist.solvers import Solution
from topiarist.solvers.quantized import Held, QuantizedSolution


class QuantizingWalk(Walk):
    """Its pruner's solver is a `Quantized`. Each block's masks are noted before it is quantised, and forgotten after it."""

    layer_report = QuantizedLayer

    def __init__(self, *given: Any, packs: bool, head: bool = False) -> None:
        """packs: whether blocks are written packed, or as the checkpoint stores them. head: the output head packed too."""
        super().__init__(*given)
        self.packs, self.head = packs, head
        self._solutions: dict[str, QuantizedSolution] = {}
        self._masks: dict[str, Pattern | None] = {}
        self.pruner.on_solution = self._note
        self._wanted = {name for name, pattern in self.pruner.patterns.items() if pattern is not None}
        self.pruner.patterns = self._masks

    def _note(self, name: str, solution: Solution) -> None:
        assert isinstance(solution, QuantizedSolution)
        self._solutions[name] = solution

    def _dense_block(self, stream: BlockStream | None, index: int) -> nn.Module:
        block = super()._dense_block(stream, index)
        self._masks.clear()
        self._solutions.clear()
        for matrix in self.source.matrices(index):
            name = f"{self.names[index]}.{matrix.name}"
            self._masks[name] = Held(matrix.weight != 0) if name in self._wanted else None
        return block

    def _prune_block(self, stream: BlockStream | None, index: int) -> list[LayerReport]:
        return [self._with_rounding(layer) for layer in super()._prune_block(stream, index)]

    def _with_rounding(self, layer: LayerReport) -> QuantizedLayer:
        held = self._masks[layer.name]
        assert isinstance(held, Held)
        before = 1.0 - float(held.kept.float().mean())
        return QuantizedLayer(
            **vars(layer), sparsity_before=before, rounding_error=self._solutions[layer.name].rounding_error
        )

    def _tensors(self, index: int) -> Mapping[str, Tensor]:
        if not self.packs:
            return super()._tensors(index)
        assert isinstance(self.source, FolderModel)
        stem = f"{self.names[index]}."
        weights: dict[str, QuantizedWeight] = {
            name.removeprefix(stem): solution.quantized for name, solution in self._solutions.items()
        }
        block = packed_block(self.source, index, weights)
        # The head is written with the last block: one journal line a block, and the head is small beside one.
        return block | packed_head(self.source) if self.head and index + 1 == len(self.names) else block

    def _outside(self, checkpoint: Checkpoint) -> list[str]:
        assert isinstance(self.source, FolderModel)
        names = super()._outside(checkpoint)
        return [name for name in names if name != f"{head_name(self.source)}.weight"] if self.head else names

    def _finished(self, output: OutputFolder, line: Mapping[str, Any]) -> Checkpoint:
        block = output.block(line)
        return DequantisedCheckpoint.of_packed(block, self.source.dtype) if self.packs else block
