"""What a solver is: a frozen value that maps (weight, gram, pattern) to a Solution. Tensors only; inputs never change."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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


@options
class Solver(ABC):
    """Maps weights and the Gram of their common input to solutions. Hyper-parameters are the fields."""

    needs_data: ClassVar[bool] = True
    """Whether it looks at the Gram."""
    copies: ClassVar[tuple[int, int]] = (5, 12)
    """fp32 matrices of its Gram's size that it holds at most, and of its weights' size: for plans."""

    @property
    def most_copies(self) -> tuple[int, int]:
        """`copies`, as this solver is set."""
        return self.copies

    def __call__(self, weight: Float[Tensor, "out in"], gram: Gram, pattern: Pattern) -> Solution:
        """Prune one weight (out, in), any float dtype and device.

        Raises PatternError if the pattern does not fit the shape, NumericalError on NaN or Inf. Warns
        (CalibrationWarning) if the Gram saw fewer tokens than it has inputs.
        """
        return self.together([weight], gram, [pattern])[0]

    @abstractmethod
    def together(self, weights: Sequence[Tensor], gram: Gram, patterns: Sequence[Pattern]) -> list[Solution]:
        """Prune several weights that share one input, so that work on the Gram is done once."""

    @abstractmethod
    def without_data(self, weight: Float[Tensor, "out in"], pattern: Pattern) -> Solution:
        """Prune one weight by itself, for solvers whose `needs_data` is False; its error is the share of its squares that went.

        Raises what a call with a Gram raises.
        """


@options
class GramSolver(Solver):
    """A solver in two steps: `prepare` once for a Gram, `solve` for every weight that reads that input (q, k and v; gate
    and up). It checks what it is given, takes dead inputs out, refits on request, casts once and measures the error.
    """

    refit: bool = False
    """End with a least-squares refit of the kept weights on the chosen support."""
    refit_damping: NonNegativeFloat = 1e-3
    """Ridge of that refit, as a fraction of every input's own energy."""

    @property
    def most_copies(self) -> tuple[int, int]:
        """`copies`, or those of a refit, which are more."""
        return Solver.copies if self.refit else self.copies

    def prepare(self, H: Float[Tensor, "in in"]) -> Any:
        """Give the state that `solve` takes: what all weights of one input share. Here the Gram itself.

        H: undamped, fp32; dead inputs have the mean of the others' H_jj.
        """
        return H

    @abstractmethod
    def solve(
        self, state: Any, W: Float[Tensor, "out in"], pattern: Pattern
    ) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
        """Give the new weight in fp32, which may be anything where the mask is False, and the mask.

        state: of `prepare`. W: the weight in fp32, zero at dead inputs if the solver looks at data; it never changes.
        """

    def without_data(self, weight: Float[Tensor, "out in"], pattern: Pattern) -> Solution:
        """Prune one weight by itself, without `refit`; its error is the share of its squares that went."""
        _check(weight, pattern)
        W = weight.detach().float()
        nothing = W.new_zeros(()).expand(W.shape[1], W.shape[1])  # of a Gram's shape, in no memory
        new, mask = self.solve(self.prepare(nothing), W, pattern)
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
        state, found = self.prepare(H), []
        for weight, pattern in zip(weights, patterns, strict=True):
            W = weight.detach().float()
            if self.needs_data or self.refit:
                W = W.masked_fill(dead, 0.0)
            new, mask = self.solve(state, W, pattern)
            if self.refit:
                new = linalg.masked_least_squares(W, H, mask, start=new, damping=self.refit_damping)
            found.append(self._finish(weight, new, mask, true_H))
        return found

    def _finish(self, weight: Tensor, new: Tensor, mask: Tensor, true_H: Tensor) -> Solution:
        if not torch.isfinite(new).all():
            raise NumericalError(f"{type(self).__name__} produced NaN or Inf")
        # masked_fill writes +0.0: a -0.0 has broken readers of sparse formats before.
        new = new.to(weight.dtype).masked_fill(~mask, 0.0)
        return Solution(new, mask, linalg.reconstruction_error(weight, new, true_H))


def _check(weight: Tensor, pattern: Pattern) -> None:
    pattern.check(tuple(weight.shape))
    if not torch.isfinite(weight).all():
        raise NumericalError("NaN or Inf in the weight")
