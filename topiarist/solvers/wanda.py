"""Wanda (Sun et al., ICLR 2024, arXiv 2306.11695): weight magnitude times the norm of its input."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from topiarist.core.options import options
from topiarist.core.patterns import Pattern, Unstructured
from topiarist.core.selection import keep_largest_evenly
from topiarist.solvers.base import GramSolver


@options
class Wanda(GramSolver):
    """Keeps the weights of largest |w_ij| * ||x_j||_2 (eq. 1); weights are not updated. Cost: one selection.

    Choose it when seconds matter, and add `refit=True`: its mask with a refit beats SparseGPT's weights on most layers.

    Differs from the authors' code in: 1. an exact count for the matrix, rows within one of each other (theirs rounds
    each row's down). 2. `per_row=False` compares over the whole matrix. Like theirs, an
    unstructured pattern is applied row by row unless told otherwise.
    """

    copies: ClassVar[tuple[int, int]] = (0, 3)

    per_row: bool = True
    """Compare within each output row (the paper's choice) or over the matrix."""

    def prepare(self, H: Float[Tensor, "in in"]) -> Float[Tensor, " in"]:
        """The norms of the inputs."""
        return H.diagonal().sqrt()

    def solve(
        self, state: Float[Tensor, " in"], W: Float[Tensor, "out in"], pattern: Pattern
    ) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
        """The weights as they are, and the mask of |w_ij| * ||x_j||. state: the norms ||x_j||."""
        scores = W.abs() * state
        if self.per_row and isinstance(pattern, Unstructured):
            kept = pattern.num_kept((scores.shape[0], scores.shape[1]))
            return W, keep_largest_evenly(scores, kept)
        return W, pattern.mask(scores)
