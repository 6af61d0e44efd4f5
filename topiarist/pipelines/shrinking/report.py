"""What a structural run did, and the command that repeats it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from topiarist.results.report import RunReport


@dataclass(frozen=True)
class Refitted:
    """A matrix that consumed units: how many stay, and its relative output error before and after the refit."""

    name: str
    shape: tuple[int, int]
    """As it was."""
    pattern: str
    """How many units stay of how many."""
    sparsity: float
    """Share of its input columns that went."""
    error: float
    error_without: float
    """With the kept columns as they were."""
    tokens: int


@dataclass(kw_only=True)
class ShrinkReport(RunReport):
    """The result of `shrink`."""

    pipeline: ClassVar[str] = "shrink"
    derived: ClassVar[tuple[str, ...]] = ("mean_error",)
    parts: ClassVar[Mapping[str, Callable[[Any], Any]]] = {
        "layers": lambda plain: Refitted(**{**plain, "shape": tuple(plain["shape"])})
    }

    keep: float
    layout: str
    units: list[str]
    scope: str
    pattern: str = ""
    """Share that is kept, and layout."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Of the whole model: dense, kept, stored; `biases` where the method added some."""
    blocks: list[dict[str, Any]] = field(default_factory=list)
    """One entry a group of units: block, name, kind, kept, of, slots."""
    tensor_parallel: list[int] = field(default_factory=list)
    """Degrees of tensor parallelism that divide the KV heads and channels of every layer evenly, up to 8; empty
    for a model type without a row."""
    merged: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Of a run that merges experts: layer -> expert that stays -> those averaged into it, by their old numbers."""
    layers: list[Refitted] = field(default_factory=list)
    """Of a run with refit: what it did."""
    splits: list[dict[str, Any]] = field(default_factory=list)
    """Of a run with a target: every split that was tried, its parameters, its loss in nats, and milliseconds a token where they
    are the target."""
    recovered: list[dict[str, float]] = field(default_factory=list)
    """Of a run with recovery: step and loss, first and last and some between."""
    result: Any = None
    """The smaller model, if a model object was given."""

    def __post_init__(self) -> None:
        self.share_kept(self.keep)

    def share_kept(self, keep: float) -> None:
        """Say how much is kept: a target of latency shows it when splits have been tried."""
        self.keep, self.pattern = keep, f"keep {keep:g}, {self.layout}"

    @property
    def share(self) -> float:
        """Parameters of the stored model, of the dense one's."""
        return self.parameters["stored"] / self.parameters["dense"]

    def counts(self) -> dict[str, tuple[int, int, int]]:
        """{kind: (kept, of, layers)}, summed over all layers."""
        found: dict[str, tuple[int, int, int]] = {}
        for row in self.blocks:
            kept, of, layers = found.get(row["kind"], (0, 0, 0))
            found[row["kind"]] = kept + row["kept"], of + row["of"], layers + 1
        return found

    @property
    def mean_error(self) -> float | None:
        """Mean of the refitted matrices' relative output errors; None without a refit."""
        return sum(layer.error for layer in self.layers) / len(self.layers) if self.layers else None

    def provenance(self) -> dict[str, Any]:
        """What was kept, kind by kind."""
        return {
            "structured": {
                "keep": self.keep,
                "layout": self.layout,
                "units": self.units,
                "parameters": dict(self.parameters),
                "counts": {kind: list(counts) for kind, counts in self.counts().items()},
            }
        }
