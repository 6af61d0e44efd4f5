"""What a solver is: a frozen value that maps (weight, gram, pattern) to a Solution. Tensors only; inputs never change."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import NonNegativeFloat
from torch import Tensor

from topiarist.core import linalg
from topiarist.core.errors import CalibrationWarning, NumericalError
from topiarist.core.gram import Gram
from topiarist.core.options import options
from topiarist.core.patterns import Pattern


@dataclass(frozen=True)
class Solution:
    """A pruned weight in the dtype of the given one, its mask (True = kept) and its relative reconstruction error."""

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    error: float


@dataclass(frozen=True)
class Problem:
    """One weight in fp32 with its undamped Gram. Dead inputs have weight 0 and a mean H_jj."""

    W: Float[Tensor, "out in"]
    H: Float[Tensor, "in in"]
    pattern: Pattern


@options
class Solver(ABC):
    """Hyper-parameters are the fields; tensors are the arguments. A method overrides `solve`, or `solve_all` if
    matrices that share one input (q/k/v, gate/up) can share its work.
    """

    needs_data: ClassVar[bool] = True
    """Whether `solve` looks at the Gram."""
    refit: bool = False
    """End with a least-squares refit of the kept weights on the chosen support."""
    refit_damping: NonNegativeFloat = 1e-3
    """Ridge of that refit, as a fraction of every input's own energy."""

    def __call__(self, weight: Float[Tensor, "out in"], gram: Gram, pattern: Pattern) -> Solution:
        """Prune one weight (out, in), any float dtype and device.

        Raises PatternError if the pattern does not fit the shape, NumericalError on NaN or Inf. Warns
        (CalibrationWarning) if the Gram saw fewer tokens than it has inputs.
        """
        return self.together([weight], gram, [pattern])[0]

    def without_data(self, weight: Float[Tensor, "out in"], pattern: Pattern) -> Solution:
        """Prune one weight by itself; its error is the share of its squares that went.

        Only for solvers whose `needs_data` is False, without `refit`. Raises what a call with a Gram raises.
        """
        _check(weight, pattern)
        W = weight.detach().float()
        nothing = W.new_zeros(()).expand(W.shape[1], W.shape[1])  # of a Gram's shape, in no memory
        new, mask = self.solve(Problem(W, nothing, pattern))
        new = new.to(weight.dtype).masked_fill(~mask, 0.0)
        dense, lost = (float(D.square().sum(dtype=torch.float64)) for D in (W, W - new.float()))
        return Solution(new, mask, lost / dense if dense > 0 else 0.0)

    def together(self, weights: Sequence[Tensor], gram: Gram, patterns: Sequence[Pattern]) -> list[Solution]:
        """Prune several weights that share one input, so that work on the Gram is done once."""
        for weight, pattern in zip(weights, patterns, strict=True):
            _check(weight, pattern)
            if weight.shape[1] != gram.in_features:
                raise ValueError(f"weight of {weight.shape[1]} inputs does not fit a Gram of {gram.in_features}")
        if gram.tokens < gram.in_features:
            warnings.warn(
                f"{gram.tokens} calibration tokens for {gram.in_features} inputs: use more, the result may not generalise",
                CalibrationWarning,
                stacklevel=3,
            )
        true_H = gram.matrix.to(weights[0].device)
        H, dead = true_H, gram.dead.to(true_H.device)
        if bool(dead.any()):
            # A dead input gets an ordinary variance, whatever the Gram's scale, and a weight of zero: it wins no budget.
            H = true_H.clone()
            live = H.diagonal()[~dead]
            H.diagonal()[dead] = live.mean() if len(live) else 1.0
        problems = [
            Problem(weight.detach().float().masked_fill(dead, 0.0), H, pattern)
            for weight, pattern in zip(weights, patterns, strict=True)
        ]
        pruned = self.solve_all(problems)
        return [
            self._finish(weight, problem, new, mask, true_H)
            for weight, problem, (new, mask) in zip(weights, problems, pruned, strict=True)
        ]

    def _finish(self, weight: Tensor, problem: Problem, new: Tensor, mask: Tensor, true_H: Tensor) -> Solution:
        if self.refit:
            new = linalg.masked_least_squares(problem.W, problem.H, mask, start=new, damping=self.refit_damping)
        if not torch.isfinite(new).all():
            raise NumericalError(f"{type(self).__name__} produced NaN or Inf")
        # masked_fill writes +0.0: a -0.0 has broken readers of sparse formats before.
        new = new.to(weight.dtype).masked_fill(~mask, 0.0)
        return Solution(new, mask, linalg.reconstruction_error(weight, new, true_H))

    def solve_all(self, problems: Sequence[Problem]) -> list[tuple[Tensor, Tensor]]:
        """(new weight fp32, mask) of each problem; all share one H."""
        return [self.solve(problem) for problem in problems]

    @abstractmethod
    def solve(self, problem: Problem) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
        """(new weight fp32, mask). The new weight may be anything where the mask is False."""


def _check(weight: Tensor, pattern: Pattern) -> None:
    pattern.check(tuple(weight.shape))
    if not torch.isfinite(weight).all():
        raise NumericalError("NaN or Inf in the weight")
