"""What a quantising run did, matrix by matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from topiarist.results.report import LayerReport, Report


@dataclass(frozen=True)
class QuantizedLayer(LayerReport):
    """One quantised matrix. `pattern` is "held": its zeros stayed; `sparsity` counts those that rounding added too."""

    sparsity_before: float
    rounding_error: float
    """Relative reconstruction error if every weight had gone to its nearest level, the group's largest at the grid's end."""


@dataclass(kw_only=True)
class QuantizeReport(Report):
    """The result of `quantize`. `weights["after"]` is what the files hold."""

    pipeline: ClassVar[str] = "quantize"
    derived: ClassVar[tuple[str, ...]] = ("sparsity", "mean_error", "mean_rounding_error")
    parts: ClassVar[Mapping[str, Callable[[Any], Any]]] = {"layers": QuantizedLayer.from_dict}

    bits: int
    group: int | None
    """Weights that share a scale; None: a row."""
    format: str
    """`pack-quantized`; of a model object `dense`: its own dtype, values on the grid."""
    pruned: Mapping[str, Any] = field(default_factory=dict)
    """The `pruning_config` of the model that was quantised: its claims hold for the result."""

    @property
    def mean_rounding_error(self) -> float:
        """Mean error of the matrices, had every weight been rounded to its nearest level."""
        return sum(layer.rounding_error for layer in self._quantized) / max(len(self.layers), 1)

    @property
    def _quantized(self) -> list[QuantizedLayer]:
        return [layer for layer in self.layers if isinstance(layer, QuantizedLayer)]

    def pruning_config(self, version: str) -> dict[str, Any]:
        """What the model was pruned to stays said; how it was quantised stands beside it."""
        own = super().pruning_config(version)
        return {**self.pruned, "quantized": own} if self.pruned else own

    def provenance(self) -> dict[str, Any]:
        """The grid; nothing is claimed of zeros."""
        return {"bits": self.bits, "group": self.group, "format": self.format}
