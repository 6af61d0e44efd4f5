"""The walk over the blocks of a quantising run: that of pruning, with the masks that are there."""

from __future__ import annotations

from typing import Any

from torch import nn

from topiarist.core.patterns import Pattern
from topiarist.pipelines.common.stream import BlockStream
from topiarist.pipelines.pruning.packing_walk import PackingWalk
from topiarist.pipelines.quantizing.report import QuantizedLayer
from topiarist.results.report import LayerReport
from topiarist.solvers.quantized import Held


class QuantizingWalk(PackingWalk):
    """Each block's masks are noted before it is quantised, and forgotten after it."""

    layer_report = QuantizedLayer

    def __init__(self, *given: Any, head: bool = False) -> None:
        super().__init__(*given, head=head)
        self._masks: dict[str, Pattern | None] = {}
        self._wanted = {name for name, pattern in self.pruner.patterns.items() if pattern is not None}
        self.pruner.patterns = self._masks

    def _dense_block(self, stream: BlockStream | None, index: int) -> nn.Module:
        block = super()._dense_block(stream, index)
        self._masks.clear()
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
            **vars(layer), sparsity_before=before, rounding_error=self.solutions[layer.name].rounding_error
        )
