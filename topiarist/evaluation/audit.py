"""What the files of a checkpoint say about its zeros, matrix by matrix, beside what it claims."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from topiarist.checkpoints.dequantised import readable
from topiarist.checkpoints.reading import locate
from topiarist.evaluation.stored import StoredMatrices, Unread
from topiarist.evaluation.verify import pattern_holds

COMMON_PATTERNS = ("1:4", "2:4", "4:8", "8:16")


@dataclass(frozen=True)
class MatrixAudit:
    """What the files say about one matrix."""

    name: str
    shape: tuple[int, ...]
    sparsity: float | None
    """The share of zeros; None if the weights cannot be looked into."""
    pattern: str | None
    """The pattern the checkpoint claims, or else an N:M pattern that its zeros happen to keep."""
    holds: bool | None
    """Whether the zeros are at least those of a claimed pattern; None without a claim, or if they cannot be seen."""
    unread: str = ""
    """Why the weights cannot be looked into."""


def audit(folder: str | Path) -> tuple[dict[str, Any], list[MatrixAudit]]:
    """The `pruning_config` of a checkpoint and every prunable matrix of its files, held against what it claims.

    Models of a type that cannot be pruned, and quantised ones, are looked at by the names of their tensors.
    Raises CheckpointError for a folder that cannot be read.
    """
    checkpoint = readable(locate(folder), strict=False)
    claims = checkpoint.claims()
    audits = [_of_one(name, weight, claims.get(name)) for name, weight in StoredMatrices(checkpoint).matrices(claims)]
    return checkpoint.config.get("pruning_config") or {}, audits


def _of_one(name: str, weight: Tensor | Unread, claim: str | None) -> MatrixAudit:
    if isinstance(weight, Unread):
        return MatrixAudit(name, (), None, claim, None, weight.why)
    mask = weight != 0
    sparsity = 1.0 - int(mask.sum()) / mask.numel()
    holds = None if claim is None else pattern_holds(mask, claim)
    return MatrixAudit(name, tuple(weight.shape), sparsity, claim or _kept_pattern(mask, sparsity), holds)


def _kept_pattern(mask: Bool[Tensor, "rows cols"], sparsity: float) -> str | None:
    """The strictest common N:M pattern that an unclaimed matrix keeps."""
    return next((p for p in COMMON_PATTERNS if sparsity > 0.4 and pattern_holds(mask, p)), None)
