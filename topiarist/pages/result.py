"""What lies in the folder of a result: the run's report, what was measured since, and how sizes follow from it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topiarist.errors import CheckpointError

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
        report = _read(folder / REPORT)
        if not report:
            raise CheckpointError(f"{folder} has no {REPORT}: not a finished result of topiarist")
        config = _read(folder / "config.json").get("pruning_config", {})
        facts = {"pattern": "?", "warnings": [], **config, **report.get("pruning_config", {}), **report}
        facts.setdefault("model", facts.get("base_model", "?"))
        return cls(
            facts,
            str(config.get("version", "?")),
            _read(folder / EVALUATION),
            _read(folder / BENCHMARK),
            _read(folder / RUN),
            folder,
        )

    def refresh(self) -> Path:
        """Write the page again, and the measured part of the model card; the rest of the card stays as it is.

        Returns the page's path.
        """
        from topiarist.pages.card import with_measurements
        from topiarist.pages.render import report_page

        assert self.folder is not None
        write_atomically(self.folder / PAGE, report_page(self))
        card = self.folder / CARD
        if card.is_file():
            write_atomically(card, with_measurements(card.read_text(encoding="utf-8"), self))
        return self.folder / PAGE

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


def save_evaluation(folder: str | Path, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Put measurements beside a checkpoint and show them on its page. What was measured the same way is replaced.

    found: {"perplexity": [...], "tasks": [...]}, each entry with the dense model's figure under "dense".
    """
    path = Path(folder) / EVALUATION
    known = _read(path)
    identity = {
        "perplexity": ("digest", "window", "dtype"),
        "tasks": ("task", "metric", "digest", "num_items", "dtype"),
    }
    merged = {}
    for kind, keys in identity.items():
        entries = {tuple(entry[k] for k in keys): entry for entry in [*known.get(kind, []), *found.get(kind, [])]}
        merged[kind] = list(entries.values())
    write_atomically(path, json.dumps(merged, indent=2) + "\n")
    if (path.parent / REPORT).is_file():
        Result.from_folder(folder).refresh()
    return path


def save_benchmark(folder: str | Path, found: Mapping[str, Any]) -> Path:
    """Put speeds beside a checkpoint (machine, verdict, speeds, ...) and show them on its page."""
    path = Path(folder) / BENCHMARK
    write_atomically(path, json.dumps(found, indent=2) + "\n")
    if (path.parent / REPORT).is_file():
        Result.from_folder(folder).refresh()
    return path


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def _read(path: Path) -> dict[str, Any]:
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
