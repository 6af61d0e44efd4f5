"""The matrices of a checkpoint as its files hold them: through the model's own structure, or by their names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from topiarist.checkpoints.reading import Checkpoint
from topiarist.core.errors import CheckpointError, UnsupportedModel
from topiarist.models.folder import FolderModel

_EIGHT_BIT = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_IN_A_BLOCK = re.compile(r"\.\d+\..*weight$")


@dataclass(frozen=True)
class Unread:
    """Why the zeros of a weight cannot be seen."""

    why: str


class StoredMatrices:
    """Weights of a checkpoint by the names of its model, for folders that the pipelines would refuse as well."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @cached_property
    def model(self) -> FolderModel | None:
        """The structure of the model; None where only the files can be looked at: quantised, or of an unknown type."""
        from transformers import CONFIG_MAPPING

        try:
            opened = FolderModel(self.checkpoint, device=torch.device("cpu"))
            return opened if opened.block_names else None
        except UnsupportedModel:
            return None
        except CheckpointError:
            if self.checkpoint.config.get("model_type") in CONFIG_MAPPING:
                raise
            return None

    @property
    def method(self) -> str:
        """How the weights are quantised, in the config's word."""
        stated = self.checkpoint.config.get("quantization_config")
        return str(stated.get("quant_method", "quantised")) if isinstance(stated, dict) else "quantised"

    def matrices(self, claimed: Iterable[str]) -> Iterator[tuple[str, Tensor | Unread]]:
        """(name, weight (out, in)) of every prunable matrix, those claimed among them if the files have them at all.

        By the names in the files alone: every weight of two axes inside a block, as it is stored.
        """
        if self.model is None:
            yield from self._by_name(set(claimed))
            return
        for index, path in enumerate(self.model.block_names):
            self.model.load(index)
            for matrix in self.model.matrices(index):
                yield f"{path}.{matrix.name}", matrix.weight
            self.model.release(index)

    def _by_name(self, claimed: set[str]) -> Iterator[tuple[str, Tensor | Unread]]:
        held = {name.removesuffix(".weight") for name in self.checkpoint.files if _IN_A_BLOCK.search(name)}
        for name in sorted(held | claimed):
            try:
                weight = self.parameter(f"{name}.weight")
            except CheckpointError:
                continue
            if isinstance(weight, Unread) or weight.ndim == 2 or name in claimed:
                yield name, weight

    def parameter(self, name: str) -> Tensor | Unread:
        """A parameter by its model's name, stacked from its experts if it is stored so; int8 and float8 as float32.

        Raises CheckpointError if the files have nothing of that name.
        """
        checkpoint = self.checkpoint
        try:
            by_name = name in checkpoint or self.model is None
            weight = checkpoint.read(name) if by_name else self.model.parameter(name)  # pyright: ignore[reportOptionalMemberAccess]
        except (CheckpointError, KeyError, AttributeError):
            stem = name.removesuffix("weight")
            packed = [key for key in checkpoint.files if key.startswith(stem) and key != f"{stem}bias"]
            if packed:
                return Unread(f"cannot look into {self.method} weights ({packed[0]})")
            raise CheckpointError(f"{checkpoint.folder} has no tensor {name}") from None
        if weight.is_floating_point() and weight.dtype not in _EIGHT_BIT:
            return weight
        if weight.dtype not in _EIGHT_BIT:
            return Unread(f"cannot look into {self.method} weights ({str(weight.dtype).removeprefix('torch.')})")
        points = name.removesuffix("weight") + "weight_zero_point"
        if points in checkpoint and bool(checkpoint.read(points).float().ne(0).any()):
            return Unread("cannot look into weights that are quantised with a zero point: a stored zero is no zero")
        return weight.float()
