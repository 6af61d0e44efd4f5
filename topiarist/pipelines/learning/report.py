"""What a run of learning did: the curve and the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from topiarist.results.report import RunReport

METHOD = "maskllm"


@dataclass(frozen=True)
class LearnedLayer:
    """One parameter with a learned mask; all experts of a fused parameter are one."""

    name: str
    matrices: list[str]
    shape: list[int]
    pattern: str
    sparsity: float
    flips: float
    """Fraction of its weights whose state differs from the prior's."""


@dataclass(kw_only=True)
class LearnReport(RunReport):
    """The result of `learn`."""

    pipeline: ClassVar[str] = "learn"
    derived: ClassVar[tuple[str, ...]] = ("sparsity", "flips")
    parts: ClassVar[Mapping[str, Callable[[Any], Any]]] = {"layers": lambda plain: LearnedLayer(**plain)}

    method: str = METHOD
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry an evaluation: step, tokens, loss (soft, on training text), hard_loss, flips, moved, certainty."""
    layers: list[LearnedLayer] = field(default_factory=list)

    def _mean(self, values: list[float]) -> float:
        sizes = [math.prod(layer.shape) for layer in self.layers]
        return sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes) if sizes else 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all masked weights."""
        return self._mean([layer.sparsity for layer in self.layers])

    @property
    def flips(self) -> float:
        """Fraction of the masked weights whose state differs from the prior's."""
        return self._mean([layer.flips for layer in self.layers])

    @property
    def prior_loss(self) -> float:
        """Loss of the prior's mask on the held-out slice of the training text."""
        return self.history[0]["hard_loss"]

    @property
    def loss(self) -> float:
        """Loss of the masks that were kept, the best of all evaluations, on the same slice."""
        return min(entry["hard_loss"] for entry in self.history)

    def provenance(self) -> dict[str, Any]:
        """Sparsity of every matrix."""
        return {
            "sparsity": self.sparsity,
            "modules": {name: round(layer.sparsity, 6) for layer in self.layers for name in layer.matrices},
        }
