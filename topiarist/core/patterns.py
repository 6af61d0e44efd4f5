"""Which zeros are allowed. A pattern is a plain value that turns scores into an exact mask (True = kept).

Ties are broken by position: of two equal scores the one with the lower index is kept, so a mask depends on nothing but
the scores. `sparsity` is the fraction of zeros; `NM(keep, of)` keeps `keep` of every `of` consecutive weights along the
input axis of a row (Wanda's and llm-compressor's N counts the pruned ones instead).
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topiarist.core.errors import PatternError
from topiarist.core.selection import keep_largest, keep_largest_per_row, rank_network, transposable_mask

MAX_GROUP = 32


class Pattern(ABC):
    """A set of allowed masks for an (out, in) matrix."""

    @abstractmethod
    def mask(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """The support of the nearest allowed matrix: keeps the largest sum of squares of these magnitudes (>= 0).

        Exact counts, ties by lower index.
        """

    @abstractmethod
    def num_kept(self, shape: tuple[int, ...]) -> int:
        """How many weights a mask of this pattern keeps in a matrix of `shape`."""

    @abstractmethod
    def holds(self, mask: Bool[Tensor, "out in"]) -> bool:
        """Whether the zeros of `mask` are at least those the pattern asks for (more zeros are allowed)."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise PatternError if no mask of this pattern exists for `shape`."""
        if len(shape) != 2 or 0 in shape:
            raise PatternError(f"pattern {self} needs a non-empty matrix (out, in), got shape {tuple(shape)}")

    def sparsity_of(self, shape: tuple[int, ...]) -> float:
        """The exact fraction of zeros that this pattern gives a matrix of `shape`."""
        return 1.0 - self.num_kept(shape) / math.prod(shape)


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Zeros anywhere: the given fraction of the matrix, or of every output row."""

    sparsity: float
    per: str = "matrix"

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise PatternError(f"sparsity {self.sparsity} is not in [0, 1): it is the fraction of zeros, e.g. 0.7")
        if self.per not in ("matrix", "row"):
            raise PatternError(f"Unstructured.per is 'matrix' or 'row', got {self.per!r}")

    def __str__(self) -> str:
        return _decimal(self.sparsity) + ("/row" if self.per == "row" else "")

    def num_kept(self, shape: tuple[int, ...]) -> int:
        """The number kept of the matrix, or of a row times the rows; the number of zeros is what is rounded."""
        if self.per == "row":
            return shape[0] * (shape[1] - _round(self.sparsity * shape[1]))
        return math.prod(shape) - _round(self.sparsity * math.prod(shape))

    def mask(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """The largest scores of the matrix, or of every row. Raises PatternError if `check` does."""
        self.check(tuple(scores.shape))
        kept = self.num_kept(tuple(scores.shape))
        if self.per == "matrix":
            return keep_largest(scores, kept)
        return keep_largest_per_row(scores, kept // scores.shape[0])

    def holds(self, mask: Bool[Tensor, "out in"]) -> bool:
        """Whether no more weights are kept than allowed: in the matrix, or in each row by itself."""
        if self.per == "row":
            return bool((mask.sum(1) <= self.num_kept(tuple(mask.shape)) // mask.shape[0]).all())
        return int(mask.sum()) <= self.num_kept(tuple(mask.shape))


@dataclass(frozen=True)
class NM(Pattern):
    """Keep `keep` of every `of` consecutive weights along the input axis: 2:4, 4:8, 1:4, 8:16, ..."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of <= MAX_GROUP:
            raise PatternError(
                f"N:M keeps N of every M weights with 0 < N < M <= {MAX_GROUP}, got {self.keep}:{self.of}; try 2:4"
            )

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise PatternError unless the input width is a multiple of `of`."""
        super().check(shape)
        if shape[1] % self.of:
            raise PatternError(
                f"pattern {self} needs an input width divisible by {self.of}, got {shape[1]} (shape {tuple(shape)}); "
                "choose another pattern or skip this layer"
            )

    def num_kept(self, shape: tuple[int, ...]) -> int:
        """`keep` for every `of` weights of the matrix."""
        return math.prod(shape) // self.of * self.keep

    def mask(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """The `keep` largest scores of every group. Raises PatternError if `check` does."""
        self.check(tuple(scores.shape))
        groups = scores.unflatten(1, (-1, self.of))
        if self.of <= 8:
            return rank_network(groups, self.keep).flatten(1)
        return keep_largest_per_row(groups, self.keep).flatten(1)

    def holds(self, mask: Bool[Tensor, "out in"]) -> bool:
        """Whether no group keeps more than `keep` weights. Raises PatternError if groups do not fill a row."""
        self.check(tuple(mask.shape))
        return bool((mask.unflatten(1, (-1, self.of)).sum(-1) <= self.keep).all())


@dataclass(frozen=True)
class TransposableNM(Pattern):
    """N:M along both axes: every `of` x `of` block keeps `keep` in each row and each column, so W and its transpose are N:M.

    The mask is found by entropic optimal transport and rounding (TSENOR, NeurIPS 2025): within a few percent of the best
    sum, not always the best. Cost: about `STEPS` passes over the scores, then of^2 steps of greedy rounding
    and a local search.
    """

    keep: int
    of: int

    def __post_init__(self) -> None:
        NM(self.keep, self.of)

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}/transposable"

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise PatternError unless both sides are multiples of `of`."""
        super().check(shape)
        if shape[0] % self.of or shape[1] % self.of:
            raise PatternError(
                f"pattern {self} needs both sides divisible by {self.of}, got shape {tuple(shape)}; "
                f"{self.keep}:{self.of} needs it of the inputs only"
            )

    def num_kept(self, shape: tuple[int, ...]) -> int:
        """`keep` for every `of` weights of the matrix."""
        return math.prod(shape) // self.of * self.keep

    def mask(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """A mask whose sum of squared scores is near the best, block by block. Raises PatternError if `check` does."""
        self.check(tuple(scores.shape))
        down, across = scores.shape[0] // self.of, scores.shape[1] // self.of
        blocks = scores.reshape(down, self.of, across, self.of).transpose(1, 2).reshape(-1, self.of, self.of)
        chunk = max(1, 2**20 // self.of**3)  # the local search takes of^3 numbers a block; this many stay in cache
        mask = torch.cat([transposable_mask(part, self.keep) for part in blocks.float().square().split(chunk)])
        return mask.view(down, across, self.of, self.of).transpose(1, 2).reshape(scores.shape)

    def holds(self, mask: Bool[Tensor, "out in"]) -> bool:
        """Whether the mask and its transpose both are N:M. Raises PatternError if blocks do not fill the matrix."""
        self.check(tuple(mask.shape))
        one_way = NM(self.keep, self.of)
        return one_way.holds(mask) and one_way.holds(mask.T)


@dataclass(frozen=True)
class Columns(Pattern):
    """Whole input columns: the same fraction of inputs is dropped for every output row (structured pruning)."""

    sparsity: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise PatternError(f"column sparsity {self.sparsity} is not in [0, 1)")

    def __str__(self) -> str:
        return f"{_decimal(self.sparsity)}/columns"

    def num_kept(self, shape: tuple[int, ...]) -> int:
        """Kept columns times rows; the number of columns dropped is what is rounded."""
        return shape[0] * (shape[1] - _round(self.sparsity * shape[1]))

    def mask(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """The columns with the largest sums of squared scores, whole. Raises PatternError if `check` does."""
        self.check(tuple(scores.shape))
        column = scores.square().sum(0, keepdim=True)
        kept = self.num_kept(tuple(scores.shape)) // scores.shape[0]
        return keep_largest_per_row(column, kept).expand_as(scores).contiguous()

    def holds(self, mask: Bool[Tensor, "out in"]) -> bool:
        """Whether no more columns than allowed have any weight left."""
        return int(mask.any(0).sum()) * mask.shape[0] <= self.num_kept(tuple(mask.shape))


def parse_pattern(text: str | float | Pattern) -> Pattern:
    """Read `"2:4"` (keep 2 of 4), `"0.7"` (70 % zeros), `"0.7/row"`, `"0.5/columns"`, `"2:4/transposable"`.

    A Pattern passes through. Raises PatternError for anything else.
    """
    if isinstance(text, Pattern):
        return text
    spec = str(text).strip()
    if match := re.fullmatch(r"(\d+):(\d+)(/transposable)?", spec):
        return (TransposableNM if match[3] else NM)(keep=int(match[1]), of=int(match[2]))
    if match := re.fullmatch(r"(\d*\.?\d+(?:e-?\d+)?)(?:/(row|columns))?", spec):
        if match[2] == "columns":
            return Columns(float(match[1]))
        return Unstructured(float(match[1]), per=match[2] or "matrix")
    raise PatternError(
        f"cannot read pattern {spec!r}: write 2:4 (keep 2 of 4), 0.7 (70 % zeros), 0.7/row, 0.5/columns or 2:4/transposable"
    )


def _decimal(x: float) -> str:
    """As short as it can be without becoming another number: a pattern's text says its exact count of zeros."""
    short = f"{x:g}"
    return short if float(short) == x else repr(x)


def _round(x: float) -> int:
    return math.floor(x + 0.5)
