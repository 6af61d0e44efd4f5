"""Magnitude pruning: keep the largest weights."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from topiarist.core.options import options
from topiarist.solvers.base import Problem, Solver


@options
class Magnitude(Solver):
    """Keeps the weights of largest |w| and does not look at the data. The baseline to beat; cost: one selection.

    Differs from the scripts in use in: 1. exact counts (they prune `<=` a threshold: one weight too many, and all ties).
    """

    needs_data: ClassVar[bool] = False

    def solve(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The weights as they are, and the mask of |w|."""
        return problem.W, problem.pattern.mask(problem.W.abs())
