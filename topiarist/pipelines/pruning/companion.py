"""The low-rank companion of a pruned model: a PEFT adapter in a folder of its own, merged nowhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from topiarist.checkpoints.atomic import save_tensors
from topiarist.checkpoints.states import KEPT
from topiarist.checkpoints.writing import ADAPTER, OutputFolder
from topiarist.core.errors import UnsupportedModel
from topiarist.core.gram import Gram
from topiarist.core.patterns import Pattern
from topiarist.models.families import Matrix
from topiarist.models.opened import OpenedModel
from topiarist.solvers import Solution
from topiarist.solvers.low_rank import LowRank, low_rank_companion

PREFIX = "base_model.model."
"""Of every name in a PEFT adapter."""


def check_modules(source: OpenedModel, patterns: Mapping[str, Pattern | None]) -> None:
    """Raise UnsupportedModel if experts are pruned: there can be no companion to them."""
    for index, path in enumerate(source.block_names):
        for matrix in source.matrices(index):
            name = f"{path}.{matrix.name}"
            if matrix.expert is not None and patterns[name] is not None:
                raise UnsupportedModel(
                    f"low_rank: a PEFT adapter belongs to a module, and experts share one ({name}): leave experts dense by "
                    "--skip, or leave low_rank out"
                )


@dataclass
class Companion:
    """What is gathered of it, a block at a time."""

    rank: int
    dtype: torch.dtype
    """Of the adapter's tensors."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Of the matrices since the last `save`, by PEFT's names."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative reconstruction error of every matrix with its companion."""
    transposed: bool = False
    """Whether the matrices are stored (in, out), as PEFT has to be told."""

    def of(self, weight: Float[Tensor, "out in"], solution: Solution, gram: Gram) -> LowRank:
        """Compute the companion of one matrix. weight: what the solver was asked for."""
        return low_rank_companion(weight, solution.weight, gram, self.rank)

    def add(self, name: str, matrix: Matrix, found: LowRank) -> None:
        """Take in the companion of a matrix. name: the module's, whole."""
        for part, value in (("lora_A", found.A), ("lora_B", found.B)):
            self.tensors[f"{PREFIX}{name}.{part}.weight"] = value.to(self.dtype).cpu().contiguous()
        self.errors[name] = found.error
        self.transposed |= matrix.transposed

    def save(self, output: OutputFolder, index: int) -> None:
        """Keep what the matrices of a block have, before the block itself counts as done."""
        metadata = {"errors": json.dumps(self.errors), "transposed": json.dumps(self.transposed)}
        output.state(f"{ADAPTER}-{index:05d}").save(self.tensors, metadata)
        self.tensors, self.errors = {}, {}

    def write(self, output: OutputFolder, blocks: int) -> dict[str, Any]:
        """Write the adapter's folder from what was saved of every block. Returns what the report says of it."""
        tensors: dict[str, Tensor] = dict(self.tensors)
        errors, transposed = dict(self.errors), self.transposed
        for index in range(blocks):
            if (found := output.state(f"{ADAPTER}-{index:05d}").load()) is not None:
                tensors |= found[0]
                errors |= json.loads(found[1]["errors"])
                transposed |= json.loads(found[1]["transposed"])
        folder = output.folder / ADAPTER
        folder.mkdir(exist_ok=True)
        save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"}, cure=KEPT)
        output.write_text(
            f"{ADAPTER}/adapter_config.json",
            json.dumps(self._config(tensors, list(errors), transposed), indent=2) + "\n",
        )
        return {
            "rank": self.rank,
            "weights": sum(tensor.numel() for tensor in tensors.values()),
            "bytes": sum(tensor.nbytes for tensor in tensors.values()),
            "mean_error": sum(errors.values()) / max(len(errors), 1),
            "errors": errors,
        }

    def _config(self, tensors: Mapping[str, Tensor], modules: list[str], transposed: bool) -> Mapping[str, Any]:
        """A LoraConfig as PEFT stores it; alpha = rank: the update counts once."""
        ranks = {name: len(tensors[f"{PREFIX}{name}.lora_A.weight"]) for name in modules}
        lower = {name: rank for name, rank in ranks.items() if rank < self.rank}  # of matrices that have no more
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "r": self.rank,
            "lora_alpha": self.rank,
            "rank_pattern": lower,
            "alpha_pattern": lower,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": transposed,
            "target_modules": modules,
            "inference_mode": True,
        }
