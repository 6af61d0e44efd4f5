"""What a run did: numbers per layer, its provenance, its memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One pruned matrix."""

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    error: float
    """Relative reconstruction error on the calibration inputs."""
    tokens: int
    """Calibration tokens that reached it."""

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> LayerReport:
        return cls(**{**plain, "shape": tuple(plain["shape"])})


@dataclass(frozen=True)
class BlockRefinement:
    """Relative squared error of a block's output on the held-out windows, before and after."""

    name: str
    before: float
    after: float
    best_epoch: int
    """0 if no epoch was better than the unrefined block, which is then kept."""


@dataclass(frozen=True)
class JointBlock:
    """A feed-forward network that was pruned as a whole."""

    name: str
    errors: Mapping[str, float]
    """Relative squared error of its output on the windows that choose, after every step: `local` is the local solver
    alone, then `epoch 1`, ..., `down_refit`."""
    best: str
    """The step that was kept."""


@dataclass
class Report:
    """The result of `prune`. `to_dict` holds only what repeats; seconds and memory stay in `run`."""

    method: str
    settings: Mapping[str, Any]
    pattern: str
    model: str
    calibration: Mapping[str, Any]
    layers: list[LayerReport] = field(default_factory=list)
    refined: list[BlockRefinement] = field(default_factory=list)
    """A BlockRefinement of every block, if refinement was asked for."""
    joint: list[JointBlock] = field(default_factory=list)
    """A JointBlock of every feed-forward network, if the method prunes them as a whole."""
    warnings: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    """The command line that repeats this run."""
    not_in_command: list[str] = field(default_factory=list)
    """What was given as an object, and has a placeholder in the command."""
    allocation: Mapping[str, Any] = field(default_factory=dict)
    """Of a run whose patterns a rule chose: the rule, its scores and their standard errors."""
    weights: Mapping[str, Any] = field(default_factory=dict)
    """`bytes` of all weights of the dense model, and the `dtype` of most."""
    run: dict[str, Any] = field(default_factory=dict)
    """Seconds by activity, peak memory, machine: differs from run to run."""
    output: str | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> Report:
        """The report of a finished output folder."""
        plain = json.loads((folder / "pruning_report.json").read_text(encoding="utf-8"))
        run = folder / "pruning_run.json"
        return cls(
            method=plain["method"],
            settings=plain["settings"],
            pattern=plain["pattern"],
            model=plain["model"],
            calibration=plain["calibration"],
            layers=[LayerReport.from_dict(layer) for layer in plain["layers"]],
            refined=[BlockRefinement(**block) for block in plain["refined"]],
            joint=[JointBlock(**block) for block in plain.get("joint", [])],
            warnings=plain["warnings"],
            command=plain.get("command", []),
            not_in_command=plain.get("not_in_command", []),
            allocation=plain.get("allocation", {}),
            weights=plain.get("weights", {}),
            run=json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {},
            output=str(folder),
        )

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned matrices."""
        total = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        zeros = sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in self.layers)
        return zeros / total if total else 0.0

    @property
    def mean_error(self) -> float:
        return sum(layer.error for layer in self.layers) / len(self.layers) if self.layers else 0.0

    def by_kind(self) -> dict[str, list[LayerReport]]:
        """Layers by what they are in a block: names without their numbers."""
        kinds: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            parts = [part for part in layer.name.split(".") if not part.isdigit()]
            kinds.setdefault(".".join(parts[-2:]), []).append(layer)
        return kinds

    def to_dict(self) -> dict[str, Any]:
        plain = asdict(self)
        plain.pop("run")
        plain.pop("output")
        return {"sparsity": self.sparsity, "mean_error": self.mean_error, **plain}

    def pruning_config(self, version: str) -> dict[str, Any]:
        """Provenance for config.json: small, and no key that any loader interprets."""
        return {
            "version": version,
            "method": self.method,
            "settings": dict(self.settings),
            "pattern": self.pattern,
            "sparsity": self.sparsity,
            "base_model": self.model,
            "calibration": dict(self.calibration),
            "modules": {layer.name: round(layer.sparsity, 6) for layer in self.layers},
            **({"patterns": {layer.name: layer.pattern for layer in self.layers}} if self.pattern == "mixed" else {}),
        }
