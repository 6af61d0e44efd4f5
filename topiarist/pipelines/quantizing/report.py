"""What a quantising run did, matrix by matrix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from topiarist.checkpoints.writing import REPORT
from topiarist.results.report import LayerReport

RUN = "pruning_run.json"


@dataclass(frozen=True)
class QuantizedLayer(LayerReport):
    """One quantised matrix. `pattern` is "held": its zeros stayed; `sparsity` counts those that rounding added too."""

    sparsity_before: float
    rounding_error: float
    """Relative reconstruction error if every weight had gone to its nearest level, the group's largest at the grid's end."""


@dataclass
class QuantizeReport:
    """The result of `quantize`. `to_dict` holds only what repeats; seconds and memory stay in `run`."""

    method: str
    settings: Mapping[str, Any]
    bits: int
    group: int | None
    """Weights that share a scale; None: a row."""
    format: str
    """`pack-quantized`, or `dense` where no quantised format holds the model's matrices: values on the grid, in its own
    dtype."""
    model: str
    calibration: Mapping[str, Any]
    layers: list[QuantizedLayer] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    not_in_command: list[str] = field(default_factory=list)
    weights: Mapping[str, Any] = field(default_factory=dict)
    """`bytes` of the model's weights as they were, `quantized_bytes` of the files, and the `dtype` of most."""
    run: dict[str, Any] = field(default_factory=dict)
    output: str | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> QuantizeReport:
        """The report of a finished output folder."""
        plain = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        known = {entry.name: plain[entry.name] for entry in fields(cls) if entry.name in plain}
        known["layers"] = [QuantizedLayer.from_dict(layer) for layer in plain["layers"]]
        run = folder / RUN
        known["run"] = json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {}
        return cls(**(known | {"output": str(folder)}))

    @property
    def mean_error(self) -> float:
        """Mean relative reconstruction error of the matrices."""
        return sum(layer.error for layer in self.layers) / max(len(self.layers), 1)

    @property
    def mean_rounding_error(self) -> float:
        """The same, had every weight been rounded to its nearest level."""
        return sum(layer.rounding_error for layer in self.layers) / max(len(self.layers), 1)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all quantised matrices."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        zeros = sum(layer.sparsity * size for layer, size in zip(self.layers, sizes, strict=True))
        return zeros / sum(sizes) if sizes else 0.0

    def by_kind(self) -> dict[str, list[QuantizedLayer]]:
        """Layers by what they are in a block: names without their numbers."""
        kinds: dict[str, list[QuantizedLayer]] = {}
        for layer in self.layers:
            parts = [part for part in layer.name.split(".") if not part.isdigit()]
            kinds.setdefault(".".join(parts[-2:]), []).append(layer)
        return kinds

    def to_dict(self) -> dict[str, Any]:
        plain = asdict(self)
        plain.pop("run")
        plain.pop("output")
        summary = {"mean_error": self.mean_error, "mean_rounding_error": self.mean_rounding_error}
        return {"pattern": "held", "sparsity": self.sparsity, **summary, **plain}
