"""What a run of learning did: the curve, the layers, and the model card they are printed on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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


@dataclass
class LearnReport:
    """The result of `learn`. `to_dict` holds only what repeats; seconds and memory stay in `run`."""

    pattern: str
    model: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry an evaluation: step, tokens, loss (soft, on training text), hard_loss, flips, moved, certainty."""
    layers: list[LearnedLayer] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    output: str | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> LearnReport:
        """The report of a finished output folder."""
        plain = json.loads((folder / "pruning_report.json").read_text(encoding="utf-8"))
        run = folder / "pruning_run.json"
        return cls(
            **{key: plain[key] for key in ("pattern", "model", "settings", "data", "history", "warnings")},
            layers=[LearnedLayer(**layer) for layer in plain["layers"]],
            run=json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {},
            output=str(folder),
        )

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

    def to_dict(self) -> dict[str, Any]:
        plain = asdict(self)
        del plain["run"], plain["output"]
        return {"sparsity": self.sparsity, "flips": self.flips, **plain}

    def pruning_config(self, version: str) -> dict[str, Any]:
        """Provenance for config.json: small, and no key that any loader interprets."""
        return {
            "version": version,
            "method": METHOD,
            "settings": dict(self.settings),
            "pattern": self.pattern,
            "sparsity": self.sparsity,
            "base_model": self.model,
            "calibration": dict(self.data),
            "modules": {name: round(layer.sparsity, 6) for layer in self.layers for name in layer.matrices},
        }


def learned_card(report: LearnReport, version: str) -> str:
    """README.md of a checkpoint with learned masks."""
    rows = "\n".join(
        f"| {e['step']} | {e['tokens']:,} | {math.exp(min(e['hard_loss'], 700)):.2f} | {e['flips']:.2%} |"
        for e in report.history
    )
    settings = ", ".join(f"{k} {v}" for k, v in report.settings.items() if isinstance(v, str | int | float))
    return f"""---
library_name: transformers
base_model: {report.model}
tags: [pruned, sparse, "{report.pattern}", {METHOD}]
---
# {report.model.rstrip("/").rsplit("/", 1)[-1]}, learned {report.pattern} masks

{report.sparsity:.1%} of the weights of {len(report.layers)} matrices are zero; the others are those of the base model,
unless recovery is named below. The files are ordinary dense tensors: any loader opens them, and they are neither smaller
nor faster by themselves. `masks.safetensors` holds the masks alone: `topiarist apply BASE masks.safetensors OUT`.

| | |
|---|---|
| method | MaskLLM (arXiv 2409.17481), {settings} |
| text | {report.data["samples"]} sequences of {report.data["window"]} tokens, sha256 {report.data["digest"][:16]} |
| changed against the prior | {report.flips:.2%} of the weights |

Perplexity of the hard mask on a slice of the training text that was not trained on:

| step | tokens seen | perplexity | changed |
|---|---|---|---|
{rows}

Made by topiarist {version}. Measure the price before use: `topiarist eval`.
"""
