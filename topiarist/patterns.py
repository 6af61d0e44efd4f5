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

from topiarist.errors import PatternError

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
        if self.per == "row":
            return shape[0] * (shape[1] - _round(self.sparsity * shape[1]))
        return math.prod(shape) - _round(self.sparsity * math.prod(shape))

    def mask(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        self.check(tuple(scores.shape))
        kept = self.num_kept(tuple(scores.shape))
        if self.per == "matrix":
            return keep_largest(scores, kept)
        return keep_largest_per_row(scores, kept // scores.shape[0])

    def holds(self, mask: Bool[Tensor, "out in"]) -> bool:
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
        super().check(shape)
        if shape[1] % self.of:
            raise PatternError(
                f"pattern {self} needs an input width divisible by {self.of}, got {shape[1]} (shape {tuple(shape)}); "
                "choose another pattern or skip this layer"
            )

    def num_kept(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.of * self.keep

    def mask(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        self.check(tuple(scores.shape))
        groups = scores.unflatten(1, (-1, self.of))
        if self.of <= 8:
            return _rank_network(groups, self.keep).flatten(1)
        return keep_largest_per_row(groups, self.keep).flatten(1)

    def holds(self, mask: Bool[Tensor, "out in"]) -> bool:
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
        super().check(shape)
        if shape[0] % self.of or shape[1] % self.of:
            raise PatternError(
                f"pattern {self} needs both sides divisible by {self.of}, got shape {tuple(shape)}; "
                f"{self.keep}:{self.of} needs it of the inputs only"
            )

    def num_kept(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.of * self.keep

    def mask(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        self.check(tuple(scores.shape))
        down, across = scores.shape[0] // self.of, scores.shape[1] // self.of
        blocks = scores.reshape(down, self.of, across, self.of).transpose(1, 2).reshape(-1, self.of, self.of)
        chunk = max(1, 2**20 // self.of**3)  # the local search takes of^3 numbers a block; this many stay in cache
        mask = torch.cat([_transposable_mask(part, self.keep) for part in blocks.float().square().split(chunk)])
        return mask.view(down, across, self.of, self.of).transpose(1, 2).reshape(scores.shape)

    def holds(self, mask: Bool[Tensor, "out in"]) -> bool:
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
        return shape[0] * (shape[1] - _round(self.sparsity * shape[1]))

    def mask(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        self.check(tuple(scores.shape))
        column = scores.square().sum(0, keepdim=True)
        kept = self.num_kept(tuple(scores.shape)) // scores.shape[0]
        return keep_largest_per_row(column, kept).expand_as(scores).contiguous()

    def holds(self, mask: Bool[Tensor, "out in"]) -> bool:
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


def keep_largest(scores: Tensor, kept: int) -> Tensor:
    """Mask of the `kept` largest entries of a matrix. A threshold instead of a sort; ties by index."""
    total = scores.numel()
    if kept == total:
        return torch.ones_like(scores, dtype=torch.bool)
    if kept == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # A transposed view flattens in its own memory order: the threshold does not depend on order.
    flat = scores.t().reshape(-1) if scores.stride(0) == 1 else scores.reshape(-1)
    threshold = _kth_largest(flat, kept)
    mask = scores >= threshold
    excess = int(mask.count_nonzero()) - kept
    if excess:
        ties = (scores == threshold).nonzero()
        rows, cols = ties[len(ties) - excess :].unbind(1)
        mask[rows, cols] = False
    return mask


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of a long vector: a sample brackets it, and only what lies in the bracket is searched."""
    total = len(values)
    if total >= 2**16:
        # Multiples of a large prime visit every column of a matrix; a plain stride may see few of them.
        scattered = torch.arange(2**14, device=values.device) * 2_654_435_761 % total
        sample = values[scattered].sort(descending=True).values
        at, spread = len(sample) * k / total, 4 * math.sqrt(len(sample) * k / total * (1 - k / total)) + 4
        low = sample[min(int(at + spread), len(sample) - 1)]
        high = sample[max(int(at - spread), 0)]
        above = int((values > high).count_nonzero())
        between = values[(values >= low) & (values <= high)]
        if above < k <= above + len(between):
            values, k = between, k - above
    return values.kthvalue(len(values) - k + 1).values


def keep_largest_per_row(scores: Tensor, kept: int) -> Tensor:
    """Mask of the `kept` largest along the last axis, by a stable sort."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def keep_largest_evenly(scores: Tensor, kept: int) -> Tensor:
    """Mask of `kept` entries in all, the largest of every row, rows differing by at most one in their count."""
    rows = torch.arange(scores.shape[0] + 1, device=scores.device) * kept // scores.shape[0]
    order = scores.sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(scores.shape[1], device=scores.device) < rows.diff()[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, first)


def _rank_network(groups: Tensor, kept: int) -> Tensor:
    """Mask of the `kept` largest in each short group, by comparing all pairs: no sort, only element-wise passes.

    Element j beats an earlier i only if strictly larger. Runs along memory when given a transposed view.
    """
    of = groups.shape[-1]
    columns = groups.unbind(-1)
    beaten_by = [torch.zeros_like(columns[0], dtype=torch.int8) for _ in range(of)]
    for i in range(of):
        for j in range(i + 1, of):
            later_wins = columns[j] > columns[i]
            beaten_by[i] += later_wins
            beaten_by[j] += ~later_wins
    mask = torch.empty_like(groups, dtype=torch.bool)
    for i in range(of):
        torch.lt(beaten_by[i], kept, out=mask[..., i])
    return mask


STEPS = 60  # of Dykstra's algorithm
SHARPNESS = 40.0  # the transport plan is exp(SHARPNESS * score / largest score of the block), then scaled


def _transposable_mask(blocks: Tensor, keep: int) -> Tensor:
    """Mask (blocks, of, of) with `keep` in every row and column: transport, greedy rounding, repair."""
    size = blocks.shape[-1]
    scores = blocks / blocks.amax((1, 2), keepdim=True).clamp_min(1e-30)
    # Dykstra in the log domain: rows sum to keep, columns sum to keep, entries at most 1 (only that one needs a memory).
    plan = SHARPNESS * scores
    memory = torch.zeros_like(plan)
    for _ in range(STEPS):
        plan = plan + (math.log(keep) - plan.logsumexp(2, keepdim=True))
        plan = plan + (math.log(keep) - plan.logsumexp(1, keepdim=True)) + memory
        memory = plan.clamp_min(0)
        plan = plan - memory
    # Greedy: take entries by falling plan (then score) while row and column have room.
    rank = (plan.clamp_max(0).exp() + 1e-3 * scores).flatten(1).sort(dim=1, descending=True, stable=True).indices
    every = torch.arange(len(blocks), device=blocks.device)
    mask = torch.zeros_like(plan, dtype=torch.bool)
    rows = torch.full((len(blocks), size), keep, dtype=torch.int8, device=blocks.device)
    cols = rows.clone()
    for place in rank.unbind(1):
        i, j = place // size, place % size
        room = (rows[every, i] > 0) & (cols[every, j] > 0)
        mask[every, i, j] = room
        rows[every, i] -= room.to(torch.int8)
        cols[every, j] -= room.to(torch.int8)
    # Repair: row i and column j lack one. Trade a kept (i', j') for (i, j') and (i', j), at the best total score.
    while len(short := (rows > 0).any(1).nonzero().flatten()):
        m, s = mask[short], scores[short]
        n = torch.arange(len(short), device=blocks.device)
        i, j = rows[short].argmax(1), cols[short].argmax(1)
        gain = s[n, i][:, None, :] + s[n, :, j][:, :, None] - s
        legal = m & ~m[n, i][:, None, :] & ~m[n, :, j][:, :, None]
        best = gain.masked_fill(~legal, -torch.inf).flatten(1).argmax(1)
        i2, j2 = best // size, best % size
        mask[short, i2, j2] = False
        mask[short, i, j2] = True
        mask[short, i2, j] = True
        rows[short, i] -= 1
        cols[short, j] -= 1
    return _improve_pairs(mask, scores)


def _improve_pairs(mask: Tensor, scores: Tensor) -> Tensor:
    """Local search: two rows exchange one kept column each, the best exchange of every block at a time, while it pays."""
    size = mask.shape[-1]
    active = torch.arange(len(mask), device=mask.device)
    for _ in range(2 * size):
        m, s = mask[active], scores[active]
        # move[b, i, k, j]: what handing column j from row i to row k would gain.
        move = s[:, None, :, :] - s[:, :, None, :]
        move = move.masked_fill(~(m[:, :, None, :] & ~m[:, None, :, :]), -torch.inf)
        best, column = move.max(-1)
        gain, pair = (best + best.transpose(1, 2)).flatten(1).max(1)
        pays = gain > 1e-6
        if not bool(pays.any()):
            break
        active, pair, column = active[pays], pair[pays], column[pays]
        n = torch.arange(len(active), device=mask.device)
        i, k = pair // size, pair % size
        given, taken = column[n, i, k], column[n, k, i]
        mask[active, i, given] = False
        mask[active, k, given] = True
        mask[active, k, taken] = False
        mask[active, i, taken] = True
    return mask
