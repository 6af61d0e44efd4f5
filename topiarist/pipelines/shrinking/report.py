"""What a structural run did, and the model card it is printed on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from topiarist.core.registry import key_of
from topiarist.data import TextFiles
from topiarist.structured import METHODS, Method


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


@dataclass
class ShrinkReport:
    """The result of `shrink`. `to_dict` holds only what repeats; seconds and memory stay in `run`."""

    method: str
    settings: Mapping[str, Any]
    keep: float
    layout: str
    units: list[str]
    scope: str
    model: str
    calibration: Mapping[str, Any]
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Of the whole model: dense, kept, stored."""
    weights: Mapping[str, Any] = field(default_factory=dict)
    """`bytes` of all weights, dense and stored, and the `dtype` of most."""
    blocks: list[dict[str, Any]] = field(default_factory=list)
    """One entry a group of units: block, name, kind, kept, of, slots."""
    tensor_parallel: list[int] = field(default_factory=list)
    """Degrees of tensor parallelism that divide all head and channel counts evenly, up to 8."""
    layers: list[Refitted] = field(default_factory=list)
    """Of a run with refit: what it did."""
    recovered: list[dict[str, float]] = field(default_factory=list)
    """Of a run with recovery: step and loss, first and last and some between."""
    warnings: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    """The command line that repeats this run."""
    not_in_command: list[str] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    """Seconds by activity, peak memory, machine: differs from run to run."""
    output: str | None = None
    result: Any = None
    """The smaller model, if a model object was given."""

    @classmethod
    def from_folder(cls, folder: Path) -> ShrinkReport:
        """The report of a finished output folder."""
        plain = json.loads((folder / "pruning_report.json").read_text(encoding="utf-8"))
        run = folder / "pruning_run.json"
        known = {name: plain[name] for name in cls.__dataclass_fields__ if name in plain}
        known["layers"] = [Refitted(**{**layer, "shape": tuple(layer["shape"])}) for layer in plain["layers"]]
        known["run"] = json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {}
        return cls(**known, output=str(folder))

    @property
    def share(self) -> float:
        """Parameters of the stored model, of the dense one's."""
        return self.parameters["stored"] / self.parameters["dense"]

    @property
    def pattern(self) -> str:
        return f"keep {self.keep:g}, {self.layout}"

    def counts(self) -> dict[str, tuple[int, int, int]]:
        """{kind: (kept, of, layers)}, summed over all layers."""
        found: dict[str, tuple[int, int, int]] = {}
        for row in self.blocks:
            kept, of, layers = found.get(row["kind"], (0, 0, 0))
            found[row["kind"]] = kept + row["kept"], of + row["of"], layers + 1
        return found

    def to_dict(self) -> dict[str, Any]:
        plain = {name: value for name, value in vars(self).items() if name not in ("run", "output", "result", "layers")}
        layers = [asdict(layer) for layer in self.layers]
        mean = sum(layer.error for layer in self.layers) / len(self.layers) if self.layers else None
        return {
            "pattern": self.pattern,
            **({"mean_error": mean} if layers else {}),
            **plain,
            "layers": layers,
            "shrunk": True,
        }

    def pruning_config(self, version: str) -> dict[str, Any]:
        """Provenance for config.json: small, and no key that any loader interprets."""
        return {
            "version": version,
            "method": self.method,
            "settings": dict(self.settings),
            "pattern": self.pattern,
            "base_model": self.model,
            "calibration": dict(self.calibration),
            "structured": {
                "keep": self.keep,
                "layout": self.layout,
                "units": self.units,
                "parameters": dict(self.parameters),
                "counts": {kind: list(counts) for kind, counts in self.counts().items()},
            },
        }


def shrink_command(
    model: Any, data: Any, method: Method, options: Mapping[str, Any], recover: Any
) -> tuple[list[str], list[str]]:
    """The words of the command, and what in the call no command can say: those have a placeholder in capitals."""
    unsaid: list[str] = []
    words = ["topiarist", "shrink"]
    if isinstance(model, nn.Module):
        unsaid.append("a model object")
    words += ["MODEL" if isinstance(model, nn.Module) else str(model), "OUT"]
    name = key_of(METHODS, method)
    if name is None:
        unsaid.append(f"the method {type(method).__name__}")
    words += ["--method", name or "METHOD", *_settings(method, "--set")]
    if isinstance(data, TextFiles):
        for path in data.paths:
            words += ["--data", str(path)]
    elif data is not None:
        unsaid.append("text given in memory")
        words += ["--data", "TEXT"]
    for option, value in options.items():
        if isinstance(value, bool):
            words += [] if value else [f"--no-{option}"]
        elif value is not None:
            words += [f"--{option}", ",".join(value) if isinstance(value, tuple) else str(value)]
    if recover is not None:
        words += ["--recover", recover.kind, *[w for w in _settings(recover, "--recover-set") if w != "kind"]]
    return words, unsaid


def _settings(value: Any, option: str) -> Sequence[str]:
    """`option name=value` for every field that is not at its default."""
    words: list[str] = []
    for name, entry in value.__dataclass_fields__.items():
        current = getattr(value, name)
        if current != entry.default and name != "kind":
            words += [option, f"{name}={str(current).lower() if isinstance(current, bool) else current}"]
    return words


def shrunk_card(report: ShrinkReport, version: str, measured: str) -> str:
    """README.md of a shrunk model; `measured` is the part that `topiarist eval --save` renews."""
    name = report.model.rstrip("/").rsplit("/", 1)[-1]
    settings = ", ".join(f"{key} {value}" for key, value in report.settings.items())
    rows = "\n".join(f"| {kind} | {kept:,} | {of:,} |" for kind, (kept, of, _) in report.counts().items())
    opens = {
        "uniform": "Every layer has the same, smaller shape: `AutoModelForCausalLM.from_pretrained` and servers open it.",
        "padded": "Narrower layers are filled up with zeros: `AutoModelForCausalLM.from_pretrained` opens it.",
        "masked": "What went is zeros: the files are as large and as fast as the dense model's.",
        "hetero": (
            "Layers differ in shape: open it with `topiarist.load_pruned(path)`, or with `trust_remote_code=True`, which "
            "runs `modeling_pruned.py` of this folder. With `block_configs` in config.json, vLLM can open it."
        ),
    }[report.layout]
    calibration = report.calibration
    text = (
        f"{calibration['samples']} windows of {calibration['window']} tokens, sha256 {calibration['digest'][:16]}"
        if calibration.get("samples")
        else "none"
    )
    return f"""---
library_name: transformers
base_model: {report.model}
tags: [pruned, structured, {report.method}]
---
# {name}, shrunk to {report.share:.0%} with {report.method}

{report.parameters["stored"]:,} parameters of {report.parameters["dense"]:,}. {opens} `pruning_spec.json` says what was
kept, unit by unit.

{measured}

| units | kept | of |
|---|---|---|
{rows}

| | |
|---|---|
| method | {report.method}{": " * bool(settings)}{settings} |
| budget | {report.keep:g} of the parameters of all {", ".join(report.units)} |
| text | {text} |
| refit | {f"{len(report.layers)} matrices by least squares" if report.layers else "no"} |
| recovery | {f"{report.recovered[-1]['step']:.0f} steps" if report.recovered else "no"} |

Made by topiarist {version}.
"""
