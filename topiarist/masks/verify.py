"""Whether a checkpoint still has the zeros it was pruned to, after fine-tuning, merging or quantising."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from topiarist.checkpoints.reading import Checkpoint, locate
from topiarist.checkpoints.writing import MASKS
from topiarist.core.errors import CheckpointError, PatternError
from topiarist.core.patterns import NM, Columns, Pattern, Unstructured, parse_pattern
from topiarist.masks.files import MaskFile, read_whole
from topiarist.models.folder import FolderModel

_EIGHT_BIT = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Breach:
    """A tensor that is not what it is claimed to be."""

    name: str
    against: str
    """The pattern, or "its mask"."""
    came_back: int
    """Weights that should be zero and are not; 0 if the tensor cannot be compared at all."""
    of: int
    """Weights that should be zero."""
    where: str
    """Where the first ones stand, or why nothing can be compared."""

    def __str__(self) -> str:
        if not self.came_back:
            return f"{self.name}: {self.where}"
        return f"{self.name}: {self.came_back:,} of {self.of:,} weights came back against {self.against}, {self.where}"


@dataclass(frozen=True)
class Verification:
    """What was compared, and every tensor that broke."""

    patterns: int
    masks: int
    breaches: list[Breach]

    @property
    def holds(self) -> bool:
        return not self.breaches


def verify(folder: str | Path, masks: str | Path | None = None) -> Verification:
    """Hold every claimed pattern of `pruning_config`, and every mask of a mask file, against the weights in the files.

    masks: by default `masks.safetensors` in the folder, if there is one. Quantised weights are compared where they are
    stored element by element (int8 and float8); other formats are a breach that says so.
    Raises CheckpointError if nothing is claimed at all: there is nothing to verify then.
    """
    path = locate(folder)
    checkpoint = Checkpoint(path)
    claimed = checkpoint.claims()
    beside = path / MASKS
    file = MaskFile(masks if masks is not None else beside) if masks is not None or beside.is_file() else None
    if not claimed and file is None:
        raise CheckpointError(
            f"{folder} claims no pattern (no pruning_config in its config.json): nothing to verify; pass --masks "
            "masks.safetensors"
        )
    quantised = "quantization_config" in checkpoint.config
    source = None if quantised else FolderModel(checkpoint, device=torch.device("cpu"))
    breaches = [b for b in map(_judge, _claimed_weights(checkpoint, source, claimed)) if b is not None]
    for name in file or ():
        weight = _parameter(checkpoint, source, name)
        breaches += [b for b in [_against_mask(name, weight, file[name])] if b is not None]  # pyright: ignore[reportOptionalSubscript]
    return Verification(len(claimed), len(file or ()), breaches)


def _claimed_weights(
    checkpoint: Checkpoint, source: FolderModel | None, claimed: Mapping[str, str]
) -> Iterator[tuple[str, str, Tensor | str]]:
    """(name, claim, weight) of every claimed matrix; a text in place of the weight says why it cannot be read."""
    left = dict(claimed)
    if source is None:
        for name, claim in claimed.items():
            yield name, claim, _parameter(checkpoint, None, f"{name}.weight")
        return
    for index, path in enumerate(source.block_names):
        source.load(index)
        for matrix in source.matrices(index):
            if claim := left.pop(f"{path}.{matrix.name}", None):
                yield f"{path}.{matrix.name}", claim, matrix.weight
        source.release(index)
    for name, claim in left.items():
        yield name, claim, "the checkpoint has no such matrix"


def _parameter(checkpoint: Checkpoint, source: FolderModel | None, name: str) -> Tensor | str:
    """A parameter by its model's name, stacked from its experts if it is stored so; or why it cannot be read."""
    try:
        parts = [[name]] if name in checkpoint or source is None else source.disk_parts(name)
        weight = read_whole(checkpoint, parts)
    except (CheckpointError, KeyError, AttributeError):
        stem = name.removesuffix("weight")
        packed = [key for key in checkpoint.files if key.startswith(stem) and key != f"{stem}bias"]
        return f"stored in a quantised format ({packed[0]})" if packed else "the checkpoint has no such tensor"
    if weight.dtype not in _EIGHT_BIT:
        quantised = not weight.is_floating_point()
        return f"stored in a quantised format ({weight.dtype})" if quantised else weight
    points = name.removesuffix("weight") + "weight_zero_point"
    if points in checkpoint and bool(checkpoint.read(points).float().ne(0).any()):
        return "quantised with a zero point, so a stored zero is no zero"
    return weight.float()


def _judge(found: tuple[str, str, Tensor | str]) -> Breach | None:
    name, claim, weight = found
    if isinstance(weight, str):
        return Breach(name, claim, 0, 0, weight)
    try:
        pattern = parse_pattern(claim)
        mask = weight != 0
        if pattern.holds(mask):
            return None
        total = mask.numel() - pattern.num_kept(tuple(mask.shape))
        count, where = _excess(pattern, mask)
    except PatternError as error:
        return Breach(name, claim, 0, 0, str(error))
    return Breach(name, claim, count, total, where)


def _excess(pattern: Pattern, mask: Tensor) -> tuple[int, str]:
    """How many weights too many, and where. Without a mask no one can say which of them came back."""
    rows, columns = mask.shape
    if isinstance(pattern, NM):
        over = (mask.unflatten(1, (-1, pattern.of)).sum(-1) - pattern.keep).clamp(min=0)
        row, group = over.nonzero()[0].tolist()
        begin, touched = group * pattern.of, int((over > 0).any(1).sum())
        place = f"columns {begin}-{begin + pattern.of - 1}"
        return int(over.sum()), f"in {touched} of {rows} rows, first in row {row}, {place}"
    excess = int(mask.sum()) - pattern.num_kept((rows, columns))
    if isinstance(pattern, Unstructured) and pattern.per == "row":
        allowed = pattern.num_kept((rows, columns)) // rows
        over = (mask.sum(1) - allowed).clamp(min=0)
        return int(over.sum()), f"in {int((over > 0).sum())} of {rows} rows, first in row {int(over.nonzero()[0])}"
    if isinstance(pattern, Columns):
        allowed = pattern.num_kept((rows, columns)) // rows
        return max(excess, 1), f"{int(mask.any(0).sum())} columns are in use, {allowed} were kept"
    return excess, f"{int(mask.sum()):,} of {mask.numel():,} weights are not zero"


def _against_mask(name: str, weight: Tensor | str, mask: Tensor) -> Breach | None:
    if isinstance(weight, str):
        return Breach(name, "its mask", 0, 0, weight)
    if weight.shape != mask.shape:
        return Breach(name, "its mask", 0, 0, f"has shape {tuple(weight.shape)}, its mask {tuple(mask.shape)}")
    back = (weight != 0) & ~mask
    if not bool(back.any()):
        return None
    first = ", ".join(map(str, back.nonzero()[0].tolist()))
    rows = int(back.flatten(1).any(1).sum())
    return Breach(
        name, "its mask", int(back.sum()), int((~mask).sum()), f"in {rows} of {len(back)} rows, first at [{first}]"
    )
