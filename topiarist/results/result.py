"""What lies in the folder of a result: the run's report, what was measured since, and how sizes follow from it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topiarist.checkpoints.access import check_name
from topiarist.checkpoints.reading import PACKED, read_json
from topiarist.checkpoints.writing import REPORT
from topiarist.core.errors import CheckpointError
from topiarist.results.first_version import renewed
from topiarist.results.report import RUN, as_written

EVALUATION = "pruning_evaluation.json"
BENCHMARK = "pruning_benchmark.json"
PAGE = "pruning_report.html"
CARD = "README.md"
RECOVERY = "recovery"
"""Of the report and `pruning_config` of a recovered model: what the recovery did."""
_DONE = {"prune": "pruned", "apply": "masked", "quantize": "quantised"}
_TYPES = {
    "model": str, "method": str, "pattern": str, "layers": list, "warnings": list, "command": list, "not_in_command": list,
    "calibration": dict, "settings": dict, "weights": dict,
}  # fmt: skip
"""What every report has."""
SHAPE_BYTES = 16
"""Of the shape that compressed-tensors keeps beside every packed matrix."""
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
    packed: Mapping[str, Any] = field(default_factory=dict)
    """`packed.json` of a packed folder, with the sizes of what it holds; empty for any other."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> Result:
        """Raises CheckpointError if there is no report, or a file is not what it should be."""
        folder = Path(folder)
        check_name(folder)
        if not folder.is_dir():
            raise CheckpointError(f"result folder {folder} does not exist")
        if not (folder / REPORT).is_file():
            raise CheckpointError(f"{folder} has no {REPORT}: not a finished result of topiarist")
        config = json_if_any(folder / "config.json").get("pruning_config") or {}
        with as_written(folder):
            report, version = renewed(read_json(folder / REPORT)), str(config.get("version", "?"))
        for name, kind in _TYPES.items():
            if not isinstance(report.get(name), kind):
                raise CheckpointError(
                    f"{folder / REPORT} is damaged ({name}): run the same command again in a new folder"
                )
        return cls(
            report,
            version,
            json_if_any(folder / EVALUATION),
            json_if_any(folder / BENCHMARK),
            json_if_any(folder / RUN),
            folder,
            json_if_any(folder / PACKED),
        )

    @property
    def pipeline(self) -> str:
        """What kind of run it was."""
        return str(self.report["pipeline"])

    @property
    def name(self) -> str:
        """The dense model's name, without its path."""
        return str(self.report["model"]).rstrip("/").rsplit("/", 1)[-1]

    @property
    def method(self) -> str:
        """The name of the method that chose what goes."""
        return str(self.report["method"])

    @property
    def pattern(self) -> str:
        """The pattern, as text."""
        return str(self.report["pattern"])

    @property
    def title(self) -> str:
        """What was done to the model, in a few words."""
        if self.trained_dense:
            return "trained further"
        if self.pipeline == "learn":
            return f"learned {self.pattern} masks"
        if self.pipeline == "shrink":
            share = self.report["parameters"]["stored"] / self.report["parameters"]["dense"]
            return f"shrunk to {share:.0%} with {self.method}"
        bits = f", {self.bits} bits" if self.report.get("quantized") else ""
        return f"{_DONE.get(self.pipeline, self.pipeline)} {self.pattern} with {self.method}{bits}"

    @property
    def recovery(self) -> Mapping[str, Any]:
        """What a recovery did after all else; empty if there was none."""
        return self.report.get(RECOVERY, {})

    @property
    def first(self) -> Mapping[str, Any]:
        """The dense model that a chain of runs began with: `model`, its name, and `bytes` of its weights, None if unknown.

        A report written before these were carried through says what its own run was given.
        """
        weights, pruned = self.report["weights"], self.report.get("pruned") or {}
        named = pruned.get("base_model") or self.report["model"]
        return weights.get("first") or {"model": named, "bytes": weights.get("before")}

    @property
    def origin(self) -> str:
        """The name, without its path, of the dense model that a chain of runs began with."""
        return str(self.first["model"]).rstrip("/").rsplit("/", 1)[-1]

    @property
    def bits(self) -> int | None:
        """Bits of a weight of its matrices; None if they are floating-point numbers."""
        found = self.report.get("quantized") or self.report
        return int(found["bits"]) if "bits" in found else None

    @property
    def dense_quantised(self) -> bool:
        """Whether quantising is all that was done to the dense model."""
        return self.pipeline == "quantize" and not self.report.get("pruned")

    @property
    def trained_dense(self) -> bool:
        """Whether training is all that was done to the dense model; the report of a pruned one stays that of its pruning."""
        return self.pipeline == "recover"

    @property
    def layers(self) -> list[Mapping[str, Any]]:
        """The report's entries for layers, those that have a name."""
        return [layer for layer in self.report["layers"] if layer.get("name")]

    @property
    def calibration(self) -> Mapping[str, Any]:
        """The text: num_windows, window_tokens, seed, digest; empty if there was none."""
        return self.report["calibration"] if "num_windows" in self.report["calibration"] else {}

    @property
    def sparsity(self) -> float:
        """Fraction of zeros; 0 if the report does not say."""
        return float(self.report.get("sparsity", 0.0))

    @property
    def perplexities(self) -> Sequence[Mapping[str, Any]]:
        """What `evaluate` measured on text, an entry a text; empty if nothing was."""
        return self.evaluation.get("perplexity", [])

    @property
    def tasks(self) -> Sequence[Mapping[str, Any]]:
        """What `evaluate` measured on tasks, an entry a task; empty if nothing was."""
        return self.evaluation.get("tasks", [])

    @property
    def shrunk(self) -> bool:
        """Whether units were cut out, so that the files themselves are smaller."""
        return self.pipeline == "shrink"

    @property
    def size(self) -> dict[str, int] | None:
        """Bytes of the dense model, and after `topiarist pack`; None if the report does not say what it was stored in.

        Of a packed folder what it holds; else what packing will give: one bit a weight, two thirds of one at 2:4, and the
        weights that are not zero, with their scales if they are integers; a matrix that would grow stays as it is.
        """
        weights = self.report["weights"]
        if self.packed:
            return {
                "dense": int(self.first["bytes"] if self.shrunk or "first" in weights else self.packed["dense_bytes"]),
                "packed": int(self.packed["packed_bytes"]),
                "matrices": int(self.packed["sparse_dense_bytes"]),
                "matrices_packed": int(self.packed["sparse_packed_bytes"]),
            }
        if not weights:
            return None
        if self.shrunk:  # nothing is left to pack
            return {"dense": int(self.first["bytes"]), "packed": int(weights["after"])}
        item = ITEM_BYTES.get(weights["dtype"], 0)
        if not item:
            return None
        dense = stored = packed = 0
        for layer in self.layers:
            (*leading, columns), kept = layer["shape"], 1.0 - layer["sparsity"]
            rows = math.prod(leading)  # of stacked experts, all of them
            count, bits, scales, words = rows * columns, 8 * item, 0, 0
            if self.bits:
                found = self.report.get("quantized") or self.report
                bits, scales = self.bits, item * count // (found["group"] or columns)
                words = scales + 4 * rows * -(-columns * bits // 32) + SHAPE_BYTES
            dense += count * item
            stored += words or count * item
            forms = [count * bits / 8, round(count * kept) * bits / 8 + -(-count // 8)]
            if layer.get("pattern") == "2:4" or (self.report.get("pruned") or {}).get("pattern") == "2:4":
                forms.append(count * bits / 16 + -(-count // 12))
            packed += math.ceil(min(forms)) + scales
        after = int(weights["after"])
        return {
            "dense": int(self.first["bytes"]),
            "packed": after - stored + packed,
            "matrices": dense,
            "matrices_packed": packed,
        }

    def decode_gain(self) -> Mapping[str, Any] | None:
        """The benchmark's decoding at the smallest batch, where most people run."""
        decode = [speed for speed in self.benchmark.get("speeds", []) if speed["phase"] == "decode"]
        return min(decode, key=lambda speed: speed["batch"]) if decode else None


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return what to call folders side by side: each one's own name, with as much of its path as tells it from the others."""
    places = [Path(os.path.abspath(folder)) for folder in folders]  # "." has no name of its own
    names = []
    for place in places:
        others = [other.parts for other in places if other != place]
        lengths = range(1, len(place.parts))
        enough = (n for n in lengths if all(parts[-n:] != place.parts[-n:] for parts in others))
        names.append(Path(*place.parts[-next(enough, len(place.parts)) :]).as_posix())
    return names


def labels_of(results: Sequence[Result]) -> list[str]:
    """Return what a comparison calls its results: their folders, or what was done."""
    names = iter(names_of([result.folder for result in results if result.folder is not None]))
    return [result.title if result.folder is None else next(names) for result in results]


def chained(folder: Path | None) -> dict[str, Any]:
    """Return what the report of a run says of the start of its chain, `first`, among its weights.

    folder: of the model that the run is given. Empty if that is no result: the chain starts with it.
    Raises CheckpointError if its report is damaged.
    """
    if folder is None or not (folder / REPORT).is_file():
        return {}
    with as_written(folder):
        first = Result(renewed(read_json(folder / REPORT)), "").first
        return {} if first["bytes"] is None else {"first": dict(first)}


def json_if_any(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no file. Raises CheckpointError for anything else in it."""
    return read_json(path) if path.is_file() else {}
