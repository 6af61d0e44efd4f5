"""What a smaller model costs beside its rivals: which results another one beats in quality and in bytes or speed at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Axis = Literal["bytes", "tokens_per_second"]
WORDS = {"bytes": "bytes", "tokens_per_second": "tokens a second"}


@dataclass(frozen=True)
class Point:
    """One model as it is deployed.

    perplexity: on the text that all points share. bytes: of its weights as they are stored. tokens_per_second: decoding on one
    machine; None if not measured. reference: a dense model that is drawn for comparison, in bf16 or quantised.
    """

    name: str
    perplexity: float
    bytes: int
    tokens_per_second: float | None = None
    reference: bool = False

    def no_worse(self, other: Point, axis: Axis) -> bool:
        """Whether this point is at least as good in both."""
        mine, theirs = self.merit(axis), other.merit(axis)
        return mine is not None and theirs is not None and self.perplexity <= other.perplexity and mine >= theirs

    def merit(self, axis: Axis) -> float | None:
        """The axis as a number of which more is better."""
        return -self.bytes if axis == "bytes" else self.tokens_per_second


@dataclass(frozen=True)
class Frontier:
    """Points, and what they say of each other along one axis."""

    points: tuple[Point, ...]
    axis: Axis = "bytes"

    @property
    def measured(self) -> list[Point]:
        """The points that have a value on the axis, from few to many bytes, or from slow to fast."""
        known = [point for point in self.points if point.merit(self.axis) is not None]
        return sorted(known, key=lambda point: abs(point.merit(self.axis) or 0))

    def rival(self, point: Point) -> Point | None:
        """The best point that dominates this one: better in one respect and no worse in the other. None if there is none."""
        better = [p for p in self.measured if p.no_worse(point, self.axis) and not point.no_worse(p, self.axis)]
        return min(better, key=lambda p: p.perplexity, default=None)

    @property
    def best(self) -> list[Point]:
        """The points that no other dominates, in the order of `measured`."""
        return [point for point in self.measured if self.rival(point) is None]

    def sentences(self) -> list[str]:
        """In words: which points are dominated, and by what; then what the frontier is."""
        said = []
        for point in self.measured:
            rival = self.rival(point)
            if rival is not None:
                amount = self._amounts(rival, point)
                said.append(
                    f"{point.name} is dominated: {rival.name} has perplexity {rival.perplexity:.2f} instead of "
                    f"{point.perplexity:.2f} at {amount}."
                )
        names = ", ".join(point.name for point in self.best)
        return [*said, f"Not dominated in perplexity and {WORDS[self.axis]}: {names}."] if names else said

    def _amounts(self, rival: Point, point: Point) -> str:
        if self.axis == "bytes":
            return f"{rival.bytes / 1e6:.0f} MB instead of {point.bytes / 1e6:.0f} MB"
        return f"{rival.tokens_per_second:.1f} tokens a second instead of {point.tokens_per_second:.1f}"


def dense_bytes(shapes: Sequence[Sequence[int]], others: int, bits: int, group: int = 128) -> int:
    """Bytes of a dense model in 16 bits, or with its matrices quantised.

    shapes: (out, in) of the matrices. others: weights that stay in 16 bits. bits: 16, 8 or 4. group: columns that share a
    scale of 16 bits; of rows that it does not divide, half as many, and so on.
    """
    total = 2 * others
    for rows, cols in shapes:
        fitting = next((g for g in (group, group // 2, group // 4) if g and cols % g == 0), cols)
        scales = 0 if bits == 16 else 2 * rows * (cols // fitting)
        total += rows * cols * bits // 8 + scales
    return total
