"""The rules: numbers of a model -> wished densities -> exact patterns. A rule is a value; its fields are its settings.

p  sparsity asked for of the whole model     w  `half_width`     L  number of blocks
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from topiarist.allocate.budget import Shapes, budget, fit
from topiarist.core.errors import TopiaristError
from topiarist.core.options import Share, options
from topiarist.core.patterns import NM, Pattern, TransposableNM, parse_pattern
from topiarist.core.registry import name_of

Depths = Mapping[str, int]
"""Layer name -> number of its block."""
Level = Literal["matrix", "block"]


@options
class Rule(ABC):
    """What every rule has: bounds, and the patterns to choose from where not every density is allowed."""

    min_sparsity: Share = 0.0
    """No layer has fewer zeros. A wish below it is clipped."""
    max_sparsity: Share = 1.0
    """No layer has more zeros."""
    choices: str = ""
    """The only patterns a layer may have, joined by plus signs: `dense+2:4+4:8`. The sparsity asked for is then a
    budget: as many weights are kept as the choices allow within it. Without it any density is allowed, or for an N:M
    pattern dense and every N of its M."""
    measured_by: ClassVar[tuple[str, ...]] = ()
    """Fields that the scores depend on; none for a rule that looks at shapes alone."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_sparsity <= self.max_sparsity <= 1.0:
            raise TopiaristError(
                f"an allocation's bounds need 0 <= min_sparsity <= max_sparsity <= 1, got {self.min_sparsity} and "
                f"{self.max_sparsity}"
            )
        self.options()

    def options(self) -> list[Pattern | None]:
        """`choices` as patterns, None for dense."""
        texts = [text.strip() for text in self.choices.split("+") if text.strip()]
        return [None if text == "dense" else parse_pattern(text) for text in texts]

    def bounds(self, sparsity: float) -> tuple[float, float]:
        """Lowest and highest density of a layer."""
        return 1 - self.max_sparsity, 1 - self.min_sparsity

    @abstractmethod
    def wanted(self, depths: Depths, sparsity: float, scores: Mapping[str, float]) -> dict[str, float]:
        """The density that the rule would give each layer, before the budget is met exactly."""

    def patterns(
        self, shapes: Shapes, depths: Depths, pattern: Pattern, scores: Mapping[str, float] | None = None
    ) -> dict[str, Pattern | None]:
        """Exact patterns for all `shapes`, of which `depths` says the blocks and `scores` what was measured.

        Raises PatternError if bounds or choices cannot meet the sparsity that `pattern` asks for.
        """
        if not shapes:
            return {}
        total = sum(out * width for out, width in shapes.values())
        sparsity = 1 - budget(shapes, pattern) / total
        wanted = self.wanted({name: depths[name] for name in shapes}, sparsity, scores or {})
        # Where only a few densities exist, the width of the rule says what is preferred and not what is allowed.
        discrete = self.choices or isinstance(pattern, NM | TransposableNM)
        bounds = Rule.bounds(self, sparsity) if discrete else self.bounds(sparsity)
        return fit(shapes, pattern, wanted, bounds=bounds, choices=self.options())


@options
class Uniform(Rule):
    """The same for every layer; with `choices` a mixture that only meets the budget."""

    def wanted(self, depths: Depths, sparsity: float, scores: Mapping[str, float]) -> dict[str, float]:
        """The density 1 - p for every layer."""
        return dict.fromkeys(depths, 1 - sparsity)


@options
class Linear(Rule):
    """Sparsity in arithmetic progression over the blocks, from p - w in the first to p + w in the last (ATP, arXiv
    2502.14770, whose common difference is 2 w / (L - 1)). Choose it when nothing may be measured; a negative width
    makes the last blocks the dense ones. Cost: none.
    """

    half_width: float = 0.1

    def wanted(self, depths: Depths, sparsity: float, scores: Mapping[str, float]) -> dict[str, float]:
        """Densities that fall with the depth from 1 - p + w in the first block to 1 - p - w in the last."""
        last = max(max(depths.values()), 1)
        return {name: 1 - sparsity + self.half_width * (1 - 2 * depth / last) for name, depth in depths.items()}


@options
class Owl(Rule):
    """Blocks with more outliers keep more (OWL, Yin et al., ICML 2024, arXiv 2310.05175, with its constants M = 5 and
    lambda = 0.08).

    The outlier ratio of a block is the share of its weights with |w| * ||x|| above M times their mean; ratios are
    stretched to an interval of length 2 lambda, centred at 1 - p. Cost: one forward pass of the dense model.

    Differs from the authors' code in: 1. the centre is the mean weighted by parameters, so that the sparsity is exact.
    """

    threshold: PositiveFloat = 5.0
    """M."""
    half_width: NonNegativeFloat = 0.08
    """lambda."""
    level: Level = "block"
    """`matrix`: a ratio for every matrix by itself."""
    measured_by: ClassVar[tuple[str, ...]] = ("threshold", "level")

    def wanted(self, depths: Depths, sparsity: float, scores: Mapping[str, float]) -> dict[str, float]:
        """Densities 1 - p plus how far the layer's outlier ratio stands above the least, stretched to a width of 2 w."""
        low, high = min(scores[name] for name in depths), max(scores[name] for name in depths)
        width = 2 * self.half_width / (high - low) if high > low else 0.0
        return {name: 1 - sparsity + (scores[name] - low) * width for name in depths}


@options
class Sensitivity(Rule):
    """Matrices are ranked by the trace of the Hessian of the model's loss; the density rises with the rank in equal
    steps from 1 - p - w to 1 - p + w (Shao et al., ICASSP 2024, arXiv 2310.09499, algorithm 1).

    Cost: `hutchinson` takes 2 * probes forward and backward passes of every sequence, `fisher` one, `input_trace` one
    forward; the first two hold the whole model in fp32, its gradients and a copy of its matrices in memory.

    Differs from the authors' code in: 1. Rademacher probes with finite differences instead of double backward.
    2. Every sequence has probes of its own, and a standard error comes out; one sequence and one probe, as theirs, give
    ranks of noise. 3. The trace is divided by the number of weights, as eq. 6 has it. 4. Only prunable matrices are
    ranked. 5. A common shift makes the sparsity exact by parameters (theirs at 0.5 is about 0.48). Like theirs it ranks
    by size: a trace below zero is noise, and there is most noise where curvature is largest. `fisher` has most
    of the gain on the demo model for a fifteenth of the time (docs/notes/allocation.md).
    """

    estimate: Literal["fisher", "hutchinson", "input_trace"] = "fisher"
    """`fisher`: the squared gradient instead of the Hessian. `input_trace`: the mean square of the matrix's inputs."""
    level: Level = "matrix"
    """`block`: the sum over the matrices of a block."""
    half_width: float = 0.1
    """w."""
    sequences: PositiveInt = 8
    """Calibration windows that the trace is taken over."""
    probes: PositiveInt = 8
    """Random vectors for every sequence."""
    step: PositiveFloat = 1e-3
    """Of the finite difference, as a fraction of the root mean square of all measured weights. Its error grows with
    the square: 9 % at 0.01 on the demo model, below 0.1 % here (benchmarks/curvature.py)."""
    tokens: Annotated[int, Field(ge=2)] = 512
    """Windows are cut to so many tokens."""
    measured_by: ClassVar[tuple[str, ...]] = ("estimate", "sequences", "probes", "step", "tokens")

    def bounds(self, sparsity: float) -> tuple[float, float]:
        """The rule's bounds, and no layer further than w from 1 - p."""
        low, high = super().bounds(sparsity)
        return max(low, 1 - sparsity - self.half_width), min(high, 1 - sparsity + self.half_width)

    def wanted(self, depths: Depths, sparsity: float, scores: Mapping[str, float]) -> dict[str, float]:
        """Densities in equal steps from 1 - p - w to 1 - p + w by the rank of |trace|, of a matrix or of a block's sum."""
        groups: dict[str | int, float] = {}
        for name, depth in depths.items():
            key = name if self.level == "matrix" else depth
            groups[key] = groups.get(key, 0.0) + abs(scores[name])
        ranked = sorted(groups, key=lambda key: groups[key])
        last = max(len(ranked) - 1, 1)
        density = {key: 1 - sparsity + self.half_width * (2 * rank / last - 1) for rank, key in enumerate(ranked)}
        return {name: density[name if self.level == "matrix" else depth] for name, depth in depths.items()}


@options
class Search(Rule):
    """Evolution over stored solutions, chosen by the divergence from the dense model's predictions on calibration
    windows that made no Gram (after EvoPress, Sieberling et al., ICML 2025, arXiv 2410.14649).

    Every matrix is solved once at every sparsity of a grid, from Grams of the dense model; a candidate is the dense
    model with one stored solution for every layer. Children exchange levels without changing the number of weights
    kept; all are judged on a part of the selection windows, the best few on all of them, and the parent is replaced
    only by a better one. Starts from the best of uniform and linear allocations. Cost: the database (`grid` times the
    solver, on disk), then `generations` of forward passes of the whole model, which is held in memory.
    """

    level: Level = "block"
    """What changes its level together: fewer things to choose for, or finer ones."""
    grid: PositiveFloat = 0.05
    """Distance of the sparsities that are solved and stored."""
    half_width: float = 0.15
    """The grid reaches so far to both sides of p."""
    seconds: PositiveFloat | None = None
    """Ends the search early after so many, resumed runs added up; its result then depends on the clock."""
    generations: NonNegativeInt = 40
    """Rounds of children."""
    children: PositiveInt = 6
    """Candidates of a generation."""
    finalists: PositiveInt = 2
    """How many of them are judged on all selection windows."""
    solver: str = ""
    """Name of the method that solves the database; the run's own if empty. A quick one finds allocations for a slow one."""
    sequences: PositiveInt = 4
    """Calibration windows that select; the others make the Grams."""
    measured_by: ClassVar[tuple[str, ...]] = ("level", "grid", "half_width", "seconds", "generations", "children",
                                              "finalists", "solver", "sequences")  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.finalists > self.children:
            raise TopiaristError(f"search: {self.finalists} finalists of {self.children} children; ask for fewer")
        if self.half_width < self.grid:
            raise TopiaristError("search needs a half_width of at least one grid step")

    def wanted(self, depths: Depths, sparsity: float, scores: Mapping[str, float]) -> dict[str, float]:
        """scores: the density of every layer that the search chose."""
        return {name: scores[name] for name in depths}


ALLOCATIONS: dict[str, type[Rule]] = {
    "uniform": Uniform,
    "linear": Linear,
    "owl": Owl,
    "sensitivity": Sensitivity,
    "search": Search,
}


def recipe(rule: Rule) -> dict[str, Any]:
    """The rule's name in the table and all its settings."""
    return {"name": name_of(ALLOCATIONS, rule), **asdict(rule)}
