"""Whether a checkpoint still has the zeros it was pruned to, after fine-tuning, merging or quantising."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Bool
from torch import Tensor

from topiarist.checkpoints.dequantised import readable
from topiarist.checkpoints.reading import locate
from topiarist.checkpoints.writing import MASKS
from topiarist.core.errors import CheckpointError, PatternError
from topiarist.core.patterns import NM, Columns, Pattern, TransposableNM, Unstructured, parse_pattern
from topiarist.evaluation.stored import StoredMatrices, Unread
from topiarist.masks.files import MaskFile


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
    """What was compared, every tensor that broke, and every one that could not be compared."""

    patterns: int
    masks: int
    breaches: list[Breach]
    unread: dict[str, str]
    """Names of weights whose zeros cannot be seen, and why."""

    @property
    def holds(self) -> bool:
        """Whether all that is claimed was seen to hold."""
        return not self.breaches and not self.unread


def verify(folder: str | Path, masks: str | Path | None = None) -> Verification:
    """Hold every claimed pattern of `pruning_config`, and every mask of a mask file, against the weights in the files.

    masks: by default `masks.safetensors` in the folder, if there is one. Quantised weights are dequantised where their
    format is read, and compared; those of other formats are unread, and the result says why.
    Raises CheckpointError if nothing is claimed at all: there is nothing to verify then.
    """
    path = locate(folder)
    checkpoint = readable(path, strict=False)
    claims = checkpoint.claims()
    beside = path / MASKS
    file = MaskFile(masks if masks is not None else beside) if masks is not None or beside.is_file() else None
    if not claims and file is None:
        raise CheckpointError(
            f"{folder} claims no pattern (no pruning_config in its config.json): nothing to verify; pass --masks "
            "masks.safetensors"
        )
    stored = StoredMatrices(checkpoint)
    breaches: list[Breach] = []
    unread: dict[str, str] = {}
    left = dict(claims)
    for name, weight in stored.matrices(claims) if claims else ():
        if claim := left.pop(name, None):
            _note(name, _against_pattern(name, weight, claim), breaches, unread)
    breaches += [Breach(name, claim, 0, 0, "the checkpoint has no such matrix") for name, claim in left.items()]
    if file is not None:
        for name, mask in file.items():
            try:
                found = _against_mask(name, stored.parameter(name), mask)
            except CheckpointError:
                found = Breach(name, "its mask", 0, 0, "the checkpoint has no such tensor")
            _note(name, found, breaches, unread)
    return Verification(len(claims), len(file or ()), breaches, unread)


def pattern_holds(mask: Bool[Tensor, "rows cols"], claim: str) -> bool:
    """Whether a matrix has at least the zeros of a claimed pattern; False if the claim does not fit its shape."""
    try:
        return parse_pattern(claim).holds(mask)
    except PatternError:
        return False


def _note(name: str, found: Breach | Unread | None, breaches: list[Breach], unread: dict[str, str]) -> None:
    if isinstance(found, Unread):
        unread[name] = found.why
    elif found is not None:
        breaches.append(found)


def _against_pattern(name: str, weight: Tensor | Unread, claim: str) -> Breach | Unread | None:
    if isinstance(weight, Unread):
        return weight
    mask = weight != 0
    if pattern_holds(mask, claim):
        return None
    try:
        pattern = parse_pattern(claim)
        total = mask.numel() - pattern.num_kept(tuple(mask.shape))
        count, where = _excess(pattern, mask)
    except PatternError as error:
        return Breach(name, claim, 0, 0, str(error))
    return Breach(name, claim, count, total, where)


def _excess(pattern: Pattern, mask: Bool[Tensor, "rows cols"]) -> tuple[int, str]:
    """How many weights too many, and where. Without a mask no one can say which of them came back."""
    rows, columns = mask.shape
    if isinstance(pattern, NM):
        over = (mask.unflatten(1, (-1, pattern.of)).sum(-1) - pattern.keep).clamp(min=0)
        row, group = over.nonzero()[0].tolist()
        begin, touched = group * pattern.of, int((over > 0).any(1).sum())
        place = f"columns {begin}-{begin + pattern.of - 1}"
        return int(over.sum()), f"in {touched} of {rows} rows, first in row {row}, {place}"
    if isinstance(pattern, TransposableNM):
        along, across = (
            (kept.unflatten(1, (-1, pattern.of)).sum(-1) - pattern.keep).clamp(min=0) for kept in (mask, mask.T)
        )
        groups = f"{int((along > 0).sum())} groups of rows and {int((across > 0).sum())} of columns"
        return max(int(along.sum()), int(across.sum())), f"{groups} keep more than {pattern.keep}"
    excess = int(mask.sum()) - pattern.num_kept((rows, columns))
    if isinstance(pattern, Unstructured) and pattern.per == "row":
        allowed = pattern.num_kept((rows, columns)) // rows
        over = (mask.sum(1) - allowed).clamp(min=0)
        return int(over.sum()), f"in {int((over > 0).sum())} of {rows} rows, first in row {int(over.nonzero()[0])}"
    if isinstance(pattern, Columns):
        allowed = pattern.num_kept((rows, columns)) // rows
        return max(excess, 1), f"{int(mask.any(0).sum())} columns are in use, {allowed} were kept"
    return excess, f"{int(mask.sum()):,} of {mask.numel():,} weights are not zero"


def _against_mask(name: str, weight: Tensor | Unread, mask: Bool[Tensor, "..."]) -> Breach | Unread | None:
    if isinstance(weight, Unread):
        return weight
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
