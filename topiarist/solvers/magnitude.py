"""Magnitude pruning: keep the largest weights."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from topiarist.core.options import options
from topiarist.core.patterns import Pattern
from topiarist.solvers.base import GramSolver


@options
class Magnitude(GramSolver):
    """Keeps the weights of largest |w| and does not look at the data. The baseline to beat; cost: one selection.

    Differs from the scripts in use in: 1. exact counts (they prune `<=` a threshold: one weight too many, and all ties).
    """

    needs_data: ClassVar[bool] = False
    copies: ClassVar[tuple[int, int]] = (0, 3)

    def solve(
        self, state: Any, W: Float[Tensor, "out in"], pattern: Pattern
    ) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
        """The weights as they are, and the mask of |w|."""
        return W, pattern.mask(W.abs())
