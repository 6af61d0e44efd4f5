"""What lies in the folder of a result: the run's report, what was measured since, and how sizes follow from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topiarist.core.errors import CheckpointError

REPORT = "pruning_report.json"
RUN = "pruning_run.json"
EVALUATION = "pruning_evaluation.json"
BENCHMARK = "pruning_benchmark.json"
PAGE = "pruning_report.html"
CARD = "README.md"
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Result:
    """A pruned checkpoint as its JSON files describe it. The page and the card are functions of this and nothing else."""

    report: Mapping[str, Any]
    version: str
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    benchmark: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    """Seconds and memory. A run leaves them out of the page that it writes, so that the same run gives the same page."""
    folder: Path | None = None

    @classmethod
    def from_folder(cls, folder: str | Path) -> Result:
        """Raises CheckpointError if there is no report, or a file is not what it should be."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"result folder {folder} does not exist")
        report = read_json(folder / REPORT)
        if not report:
            raise CheckpointError(f"{folder} has no {REPORT}: not a finished result of topiarist")
        config = read_json(folder / "config.json").get("pruning_config", {})
        facts = {"pattern": "?", "warnings": [], **config, **report.get("pruning_config", {}), **report}
        facts.setdefault("model", facts.get("base_model", "?"))
        return cls(
            facts,
            str(config.get("version", "?")),
            read_json(folder / EVALUATION),
            read_json(folder / BENCHMARK),
            read_json(folder / RUN),
            folder,
        )

    @property
    def name(self) -> str:
        return str(self.report["model"]).rstrip("/").rsplit("/", 1)[-1]

    @property
    def method(self) -> str:
        return str(self.report.get("method") or self.report.get("settings", {}).get("preset", "learned masks"))

    @property
    def layers(self) -> list[Mapping[str, Any]]:
        return [layer for layer in self.report.get("layers", []) if layer.get("name")]

    @property
    def calibration(self) -> Mapping[str, Any]:
        return self.report.get("calibration") or self.report.get("data") or {}

    @property
    def sparsity(self) -> float:
        return float(self.report.get("sparsity", 0.0))

    @property
    def perplexities(self) -> Sequence[Mapping[str, Any]]:
        return self.evaluation.get("perplexity", [])

    @property
    def tasks(self) -> Sequence[Mapping[str, Any]]:
        return self.evaluation.get("tasks", [])

    @property
    def shrunk(self) -> bool:
        """Whether units were cut out, so that the files themselves are smaller."""
        return bool(self.report.get("shrunk"))

    @property
    def size(self) -> dict[str, int] | None:
        """Bytes of the dense model, and after `topiarist pack`; None if the report does not say what it was stored in.

        Packed: one bit a weight, and the weights that are not zero; a matrix that would grow stays as it is.
        """
        weights = self.report.get("weights", {})
        if self.shrunk:  # nothing is left to pack
            return {"dense": int(weights["dense"]), "packed": int(weights["bytes"])}
        item = ITEM_BYTES.get(weights.get("dtype", ""), 0)
        if not item or not weights.get("bytes"):
            return None
        dense = packed = 0
        for layer in self.layers:
            count = math.prod(layer["shape"])
            kept = round(count * (1.0 - layer["sparsity"]))
            dense += count * item
            packed += min(count * item, kept * item + -(-count // 8))
        total = int(weights["bytes"])
        return {"dense": total, "packed": total - dense + packed, "matrices": dense, "matrices_packed": packed}

    def decode_gain(self) -> Mapping[str, Any] | None:
        """The benchmark's decoding at the smallest batch, where most people run."""
        decode = [speed for speed in self.benchmark.get("speeds", []) if speed["phase"] == "decode"]
        return min(decode, key=lambda speed: speed["batch"]) if decode else None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no file."""
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); delete it, or make it again") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; delete it, or make it again")
    return loaded
