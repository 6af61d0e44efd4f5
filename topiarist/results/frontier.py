"""What a smaller model costs beside its rivals: which results another one beats in quality and in bytes or speed at once."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from topiarist.results.result import Result, labels_of

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


def comparable(results: Sequence[Result]) -> tuple[list[Mapping[str, Any] | None], str]:
    """The perplexity of every result on that text (same tokens, same window) which most of them were measured on."""
    counts = Counter((e["digest"], e["window"]) for result in results for e in result.perplexities)
    if not counts:
        return [None] * len(results), ""
    key = min(counts, key=lambda k: (-counts[k], k))
    chosen = [next((e for e in r.perplexities if (e["digest"], e["window"]) == key), None) for r in results]
    text = next(e["text"] for e in chosen if e)
    return chosen, f"perplexity on {text}, windows of {key[1]}"


def points_of(results: Sequence[Result]) -> tuple[Point, ...]:
    """The results of one dense model that were measured on one text, and before them the dense model itself.

    Bytes are those after `topiarist pack`. Speeds count where they were measured as those of
    most results were: one machine, one number of tokens.
    None at all if the results come from different models, whose sizes say nothing of each other.
    """
    if len({result.origin for result in results}) != 1:
        return ()
    chosen, _ = comparable(results)
    rates, dense_rate = _rates(results)
    points = []
    for result, label, entry, rate in zip(results, labels_of(results), chosen, rates, strict=True):
        if entry is not None and result.size is not None and math.isfinite(entry["value"]):
            points.append(Point(label, entry["value"], result.size["packed"], rate, reference=result.dense_quantised))
    dense = next((e["dense"]["value"] for e in chosen if e and e.get("dense")), None)
    if dense is not None and points:
        size = max(result.size["dense"] for result in results if result.size)
        points.insert(0, Point("the dense model", dense, size, dense_rate, reference=True))
    return tuple(points)


def _rates(results: Sequence[Result]) -> tuple[list[float | None], float | None]:
    """Tokens a second of every result, and of the dense model: at the smallest batch, measured as most results were.

    That is on one machine, with one number of tokens after one of the prompt; older files do not say how many.
    """
    ways = [tuple(result.benchmark.get(key) for key in ("machine", "tokens", "prompt")) for result in results]
    counts = Counter(way for way, result in zip(ways, results, strict=True) if result.decode_gain())
    most = counts.most_common(1)[0][0] if counts else None
    timed = [result.decode_gain() if way == most else None for way, result in zip(ways, results, strict=True)]
    batch = min((speed["batch"] for speed in timed if speed), default=None)
    timed = [speed if speed and speed["batch"] == batch else None for speed in timed]
    dense = [speed["dense"] for speed in timed if speed]
    return [speed["sparse"] if speed else None for speed in timed], statistics.median(dense) if dense else None


def sentences_of(results: Sequence[Result]) -> list[str]:
    """What several results say of each other in words: by bytes, and by speed where it was measured; empty if nothing."""
    points = points_of(results)
    axes: tuple[Axis, ...] = ("bytes", "tokens_per_second")
    return [said for axis in axes if len((front := Frontier(points, axis)).measured) > 1 for said in front.sentences()]


def rival_of(result: Result, others: Sequence[Result]) -> Point | None:
    """Of the dense models that were only quantised, the one nearest in bytes, if it was measured on the same text."""
    quantised = [other for other in others if other.dense_quantised and not _same(other, result)]
    points = points_of([result, *quantised])
    label = labels_of([result, *quantised])[0]
    own = next((point for point in points if point.name == label), None)
    if own is None:
        return None
    return min(points[points.index(own) + 1 :], key=lambda point: abs(math.log(point.bytes / own.bytes)), default=None)


def _same(one: Result, other: Result) -> bool:
    """Whether two results are one folder."""
    return one.folder is not None and other.folder is not None and one.folder.resolve() == other.folder.resolve()
