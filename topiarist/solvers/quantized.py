"""A solver whose values lie on a grid: mask and weights of another one, then GPTQ within the mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from topiarist.core.gram import Gram
from topiarist.core.linalg import reconstruction_error
from topiarist.core.options import Registered, options
from topiarist.core.patterns import Pattern
from topiarist.quantization import GPTQ, METHODS, Grid, Method, QuantizedWeight, round_to_nearest
from topiarist.solvers.base import Solution, Solver


@dataclass(frozen=True)
class QuantizedSolution(Solution):
    """A solution whose weight is `quantized.dequantized()`."""

    quantized: QuantizedWeight
    rounding_error: float
    """Relative reconstruction error if every weight had been rounded to the nearest level, scales by the largest weight."""


@dataclass(frozen=True)
class Held(Pattern):
    """The one mask that a pruned weight already has."""

    kept: Bool[Tensor, "out in"]

    def __str__(self) -> str:
        return "held"

    def mask(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """The mask that is held, whatever the scores."""
        return self.kept

    def num_kept(self, shape: tuple[int, ...]) -> int:
        """How many weights the held mask keeps, whatever the shape."""
        return int(self.kept.sum())

    def holds(self, mask: Bool[Tensor, "out in"]) -> bool:
        """Whether `mask` keeps nothing that the held one drops."""
        return not bool((mask & ~self.kept).any())


@options
class Unchanged(Solver):
    """Gives every weight back, with the mask of its pattern: a later step makes up for what the mask removes."""

    needs_data: ClassVar[bool] = False
    copies: ClassVar[tuple[int, int]] = (0, 3)

    def together(self, weights: Sequence[Tensor], gram: Gram, patterns: Sequence[Pattern]) -> list[Solution]:
        """Each weight with its magnitude mask; the Gram is not looked at."""
        return [self.without_data(weight, pattern) for weight, pattern in zip(weights, patterns, strict=True)]

    def without_data(self, weight: Float[Tensor, "out in"], pattern: Pattern) -> Solution:
        """The weight with its magnitude mask, and an error of 0."""
        return Solution(weight, pattern.mask(weight.abs()), 0.0)


@options
class Quantized(Solver):
    """Prunes by `solver`, then puts the kept weights on `grid` by `method`, which comes close to what the solver was asked for,
    not to what it gave: GPTQ's descent makes up for pruning and rounding together (the joint step of SparseGPT, section 3.5
    of arXiv 2301.00774, for any solver).
    """

    solver: Solver = Unchanged()
    """Gives mask and weights."""
    method: Annotated[Method, Registered(METHODS)] = GPTQ()
    """How the kept weights get to the grid."""
    grid: Grid = Grid()
    """Where they go."""

    @property
    def needs_data(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the solver or the method looks at the Gram."""
        return self.solver.needs_data or self.method.needs_data

    @property
    def most_copies(self) -> tuple[int, int]:
        """What the solver holds, and what rounding in turns does."""
        grams, weights = self.solver.most_copies
        return max(grams, 3), max(weights, 8)

    def together(self, weights: Sequence[Tensor], gram: Gram, patterns: Sequence[Pattern]) -> list[Solution]:
        """Prune by the solver, then quantise its weights and the given ones; of both the one of lower error is kept."""
        method: Any = self.method  # its factors are its own
        factors = method.prepare(gram)
        found: list[Solution] = []
        for weight, solution in zip(weights, self.solver.together(weights, gram, patterns), strict=True):
            # Where inputs are nearly dependent a solver's weights may be large and hard to round; the given ones are not.
            starts = [solution.weight] if solution.weight is weight else [solution.weight, weight]
            tries = [method.quantize(factors, start, self.grid, solution.mask, weight) for start in starts]
            found.append(self._best(weight, solution, tries, partial(reconstruction_error, gram=gram)))
        return found

    def without_data(self, weight: Float[Tensor, "out in"], pattern: Pattern) -> Solution:
        """Prune and quantise one weight by itself; its error is the share of its squares that went."""
        method: Any = self.method
        solution = self.solver.without_data(weight, pattern)
        quantized = method.quantize(None, solution.weight, self.grid, solution.mask)
        return self._best(weight, solution, [quantized], _share)

    def _best(
        self,
        weight: Tensor,
        solution: Solution,
        tries: Sequence[QuantizedWeight],
        error_of: Callable[[Tensor, Tensor], float],
    ) -> QuantizedSolution:
        errors = [error_of(weight, quantized.dequantized()) for quantized in tries]
        best = tries[errors.index(min(errors))]
        pruned = solution.weight.masked_fill(~solution.mask, 0.0)
        rounded = round_to_nearest(pruned, self.grid, search=False).dequantized()
        return QuantizedSolution(best.dequantized(), solution.mask, min(errors), best, error_of(weight, rounded))


def _share(weight: Tensor, new: Tensor) -> float:
    """The share of a weight's squares that went."""
    total = float(weight.double().square().sum())
    return float((weight.double() - new.double()).square().sum()) / total if total else 0.0
