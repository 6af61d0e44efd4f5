"""Pictures as numbers: which cell has which colour, how high a bar is. The templates turn them into markup.

All text of a picture stays HTML and only its marks are stretched, so a picture is readable at any width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

LEVELS = 9
"""Colours of a heat map; style.css names them --heat-0 ... --heat-8."""
DECADES = 4.0
"""A logarithmic scale shows at most so many powers of ten; what is smaller gets the lowest colour."""


@dataclass(frozen=True)
class Cell:
    """One block's matrices of one kind: more than one where a block has experts."""

    column: int
    level: int | None
    """Colour; None for a value that is no number."""
    title: str


@dataclass(frozen=True)
class HeatMap:
    """Kinds of matrices as rows, blocks as columns."""

    rows: list[tuple[str, list[Cell]]]
    columns: int
    ticks: list[tuple[float, int]]
    """(position from 0 to 1, block number) along the lower edge."""
    bounds: list[float]
    """Limits of the colours, one more than there are colours."""
    cut: bool
    """Whether values below the lowest limit share the first colour."""


@dataclass(frozen=True)
class Curve:
    """A line over the unit square, y upwards, and the numbers at its edges."""

    points: list[tuple[float, float]]
    low: float
    high: float
    first: float
    last: float


def place_of(name: str) -> tuple[int, str]:
    """(block number, kind) of a matrix: the first number in its name, and what follows without further numbers."""
    parts = name.split(".")
    block = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if block is None:
        return 0, name
    return int(parts[block]), ".".join(part for part in parts[block + 1 :] if not part.isdigit()) or parts[block]


def by_place(layers: Iterable[Mapping[str, Any]], field: str) -> dict[str, dict[int, list[float]]]:
    """Values of `field` by kind and block, in the layers' own order. A missing value (null) becomes NaN."""
    table: dict[str, dict[int, list[float]]] = {}
    for layer in layers:
        block, kind = place_of(layer["name"])
        value = layer[field]
        table.setdefault(kind, {}).setdefault(block, []).append(math.nan if value is None else float(value))
    return table


def heat_map(
    layers: Sequence[Mapping[str, Any]], field: str, text: Callable[[float], str], *, logarithmic: bool
) -> HeatMap | None:
    """A map of the mean of `field` in every block and kind; None if no layer states it."""
    stated = [layer for layer in layers if field in layer]
    if not stated:
        return None
    table = by_place(stated, field)
    means = {kind: {block: sum(v) / len(v) for block, v in row.items()} for kind, row in table.items()}
    finite = [m for row in means.values() for m in row.values() if math.isfinite(m)]
    scale = _log_scale(finite) if logarithmic else _linear_scale(finite)
    columns = 1 + max(block for row in table.values() for block in row)
    rows = []
    for kind, row in table.items():
        cells = []
        for block, values in sorted(row.items()):
            mean = means[kind][block]
            many = f" (mean of {len(values)}, largest {text(max(values))})" if len(values) > 1 else ""
            cells.append(Cell(block, _level(mean, scale), f"block {block}, {kind}: {text(mean)}{many}"))
        rows.append((kind, cells))
    return HeatMap(rows, columns, _ticks(columns), scale, any(m < scale[0] for m in finite))


def _log_scale(values: Sequence[float]) -> list[float]:
    """Limits of the colours, equally far apart on a logarithmic scale.

    It begins at the fifth percentile: one matrix that lost nothing would otherwise leave two colours to all others.
    """
    positive = sorted(v for v in values if v > 0) or [1.0]
    high = math.log10(positive[-1])
    low = max(math.log10(positive[len(positive) // 20]), high - DECADES)
    if high - low < 0.1:  # all alike: one colour from the middle, not noise blown up to the whole scale
        low, high = low - 0.5, high + 0.5
    return [10 ** (low + (high - low) * i / LEVELS) for i in range(LEVELS + 1)]


def _linear_scale(values: Sequence[float]) -> list[float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return [low + (high - low) * i / LEVELS for i in range(LEVELS + 1)]


def _level(value: float, scale: Sequence[float]) -> int | None:
    if not math.isfinite(value):
        return None
    return min(sum(value >= bound for bound in scale[1:]), LEVELS - 1)


def _ticks(columns: int) -> list[tuple[float, int]]:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500) if columns / s <= 10 or s == 500)
    return [((block + 0.5) / columns, block) for block in range(0, columns, step)]


def curve(values: Sequence[tuple[float, float]]) -> Curve | None:
    """(x, y) pairs as a line that fills the square; None if fewer than two are numbers."""
    known = [(x, y) for x, y in values if math.isfinite(y)]
    if len(known) < 2:
        return None
    xs, ys = [x for x, _ in known], [y for _, y in known]
    low, high, width = min(ys), max(ys), (max(xs) - min(xs)) or 1.0
    room = (high - low) or 1.0
    return Curve([((x - min(xs)) / width, (y - low) / room) for x, y in known], low, high, xs[0], xs[-1])


@dataclass(frozen=True)
class Rounds:
    """Errors of many networks over the same steps, each relative to its first; points lie in the unit square."""

    steps: list[str]
    lines: list[tuple[str, list[tuple[float, float]]]]
    """(title, points); a network whose later steps failed has fewer points."""
    median: list[tuple[float, float]]
    low: float
    high: float


def rounds(blocks: Sequence[Mapping[str, Any]]) -> Rounds | None:
    """Lines of the blocks' `errors` (step -> error); None if there is but one step, or no error to begin with."""
    known = [block for block in blocks if next(iter(block["errors"].values())) > 0]
    steps = max((list(block["errors"]) for block in known), key=len, default=[])
    if len(steps) < 2:
        return None
    ratios = [[error / next(iter(b["errors"].values())) for error in b["errors"].values()] for b in known]
    low, high = min(min(r) for r in ratios), max(max(r) for r in ratios)

    def points(values: Sequence[float]) -> list[tuple[float, float]]:
        return [(i / (len(steps) - 1), (v - low) / ((high - low) or 1.0)) for i, v in enumerate(values)]

    titles = [f"{b['name']}: " + ", ".join(f"{step} {error:.3g}" for step, error in b["errors"].items()) for b in known]
    whole = [r for r in ratios if len(r) == len(steps)]
    median = [sorted(values)[len(values) // 2] for values in zip(*whole, strict=True)]
    return Rounds(steps, list(zip(titles, map(points, ratios), strict=True)), points(median), low, high)


@dataclass(frozen=True)
class Dot:
    """A result in a panel of the comparison, at a place in the unit square."""

    number: int
    x: float
    y: float
    title: str
    label: tuple[float, float] = (1.0, 0.0)
    """Where its number stands, from the dot, in units of the number's own height; y upwards."""


@dataclass(frozen=True)
class Panel:
    """Results by (x, y), y shared between panels; `ticks` are (position, text)."""

    label: str
    dots: list[Dot]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def panel(
    label: str,
    points: Sequence[tuple[int, float, float, str]],
    y_range: tuple[float, float],
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
) -> Panel:
    """Points (number, x, y, title) in a panel with a margin; y is logarithmic if it spans more than a factor of four."""
    xs = [x for _, x, _, _ in points]
    x_low, x_high = _widened(min(xs), max(xs))
    logarithmic = y_range[0] > 0 and y_range[1] / y_range[0] > 4
    shape: Callable[[float], float] = math.log if logarithmic else float
    y_low, y_high = _widened(shape(y_range[0]), shape(y_range[1]))
    dots = [
        Dot(number, (x - x_low) / (x_high - x_low), (shape(y) - y_low) / (y_high - y_low), title)
        for number, x, y, title in points
    ]
    dots = _labelled(dots)
    x_ticks = [((x - x_low) / (x_high - x_low), x_text(x)) for x in nice_ticks(x_low, x_high)]
    back: Callable[[float], float] = math.exp if logarithmic else float
    steps = _log_ticks(math.exp(y_low), math.exp(y_high)) if logarithmic else nice_ticks(y_low, y_high)
    y_ticks = [((shape(y) - y_low) / (y_high - y_low), y_text(y)) for y in steps if back(y_low) <= y <= back(y_high)]
    return Panel(label, dots, x_ticks, y_ticks)


LABEL = (0.055, 0.065)
"""Width and height of a number, as shares of a panel."""
AROUND = [(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)]
AROUND += [(x, y) for r in (1.0, 2.0, 3.0) for y in (r, -r) for x in (1.0, -1.0)]


def _labelled(dots: Sequence[Dot]) -> list[Dot]:
    """Each number in the first free place around its dot, so that results close together can all be read."""
    taken = [(dot.x, dot.y) for dot in dots]
    placed = []
    for dot in dots:
        places = [(dot.x + dx * LABEL[0], dot.y + dy * LABEL[1]) for dx, dy in AROUND]
        free = [
            all(
                abs(x - a) >= LABEL[0] * 0.9 or abs(y - b) >= LABEL[1] * 0.9
                for a, b in taken
                if (a, b) != (dot.x, dot.y)
            )
            and 0 < x < 1
            and 0 < y < 1
            for x, y in places
        ]
        best = free.index(True) if any(free) else 0
        taken.append(places[best])
        placed.append(replace(dot, label=AROUND[best]))
    return placed


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = max(0.1 * (high - low), 0.02 * abs(high)) or 1.0
    return low - margin, high + margin


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers between the limits, about as many as wanted."""
    raw = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * f for f in (1, 2, 2.5, 5, 10) if unit * f >= raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(ticks) <= 7:
            break
    return ticks
