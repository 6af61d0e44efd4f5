"""The literal transcriptions of `tests/reference` as solvers: to run layer by layer, or through a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tests.reference import alps, baselines
from topiarist.core.patterns import NM, Pattern, Unstructured
from topiarist.solvers.base import GramSolver, Solver


def as_published(pattern: Pattern) -> dict[str, Any]:
    """A pattern as the transcriptions take it."""
    if isinstance(pattern, NM):
        return {"nm": (pattern.keep, pattern.of)}
    assert isinstance(pattern, Unstructured)
    return {"sparsity": pattern.sparsity}


@dataclass(frozen=True, kw_only=True)
class OriginalALPS(GramSolver):
    """fp64 eigendecomposition, up to 300 iterations, diagnostics that nobody reads: what the released code spends."""

    def solve(self, state: Tensor, W: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
        return alps.alps(W, state, **as_published(pattern), with_diagnostics=True)[:2]


@dataclass(frozen=True, kw_only=True)
class OriginalSparseGPT(GramSolver):
    def solve(self, state: Tensor, W: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
        return baselines.sparsegpt(W, state, **as_published(pattern))


ORIGINALS: dict[str, type[Solver]] = {"alps-original": OriginalALPS, "sparsegpt-original": OriginalSparseGPT}
