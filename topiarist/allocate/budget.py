"""From wished densities to patterns that spend a budget exactly.

K  weights kept in all      n  weights of a layer      density = 1 - sparsity, the fraction kept
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from topiarist.core.errors import PatternError
from topiarist.core.patterns import NM, Columns, Pattern, TransposableNM, Unstructured

Shapes = Mapping[str, tuple[int, int]]
MAX_STATES = 1 << 16
"""Of the budget in `mixture`; a finer one is rounded, upwards for every layer, so that it is never overdrawn."""


def budget(shapes: Shapes, pattern: Pattern) -> int:
    """K that the pattern asks for; of one without any structure by the weights of all layers together."""
    total = sum(map(math.prod, shapes.values()))
    if isinstance(pattern, Unstructured) and pattern.per == "matrix":
        return total - round(pattern.sparsity * total)
    return sum(pattern.num_kept(shape) for shape in shapes.values())


def fit(
    shapes: Shapes,
    pattern: Pattern,
    wanted: Mapping[str, float],
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    choices: Sequence[Pattern | None] = (),
) -> dict[str, Pattern | None]:
    """Patterns as near to the wanted densities as K allows.

    pattern: what it keeps of all layers together is K; its kind is that of every layer. Unstructured (and whole
    columns): one shift common to all layers, by bisection, densities clipped to `bounds`; then whole weights, handed out
    by the largest remainder, so that the zeros of all layers are exactly those asked for (to half a step where a step
    is a row or a column). With `choices` (None = dense), and for N:M where they default to dense and every smaller N of
    the same M: `mixture`.
    Raises PatternError if the bounds or choices cannot meet K.
    """
    for name, shape in shapes.items():
        check_shape(name, pattern, shape)
    kept = budget(shapes, pattern)
    if not choices and isinstance(pattern, NM | TransposableNM):
        choices = [None, *(replace(pattern, keep=keep) for keep in range(pattern.of - 1, 0, -1))]
    if choices:
        return mixture(shapes, kept, wanted, choices, bounds=bounds)
    assert isinstance(pattern, Unstructured | Columns)
    steps = {name: step(pattern, shape) for name, shape in shapes.items()}
    counts = _whole(shapes, kept, _shifted(shapes, kept, wanted, bounds), steps)
    return {name: _with_count(pattern, shapes[name], count) for name, count in counts.items()}


def step(pattern: Pattern | None, shape: tuple[int, int]) -> int:
    """By how many weights the count of a layer changes at the least."""
    if isinstance(pattern, NM | TransposableNM):
        return math.prod(shape) // pattern.of
    anywhere = pattern is None or (isinstance(pattern, Unstructured) and pattern.per == "matrix")
    return 1 if anywhere else shape[0]


def _shifted(shapes: Shapes, kept: int, wanted: Mapping[str, float], bounds: tuple[float, float]) -> dict[str, float]:
    """Real counts: clip(wanted + c, bounds) * n with the c that spends K."""
    names, (low, high) = list(shapes), bounds
    n = np.array([math.prod(shapes[name]) for name in names], dtype=np.float64)
    wish = np.array([wanted[name] for name in names], dtype=np.float64)
    # Half a weight a layer of slack: bounds that are met but for rounding are met.
    if low * n.sum() > kept + len(n) / 2 or high * n.sum() < kept - len(n) / 2:
        raise PatternError(
            f"every layer may have {1 - high:.4g} to {1 - low:.4g} zeros, so {1 - kept / n.sum():.4g} in all cannot be met; "
            "widen the bounds"
        )
    below, above = low - wish.max(), high - wish.min()
    for _ in range(100):
        middle = (below + above) / 2
        if (np.clip(wish + middle, low, high) * n).sum() < kept:
            below = middle
        else:
            above = middle
    return dict(zip(names, (np.clip(wish + above, low, high) * n).tolist(), strict=True))


def _whole(shapes: Shapes, kept: int, counts: Mapping[str, float], steps: Mapping[str, int]) -> dict[str, int]:
    """Counts in whole steps that add up to K: rounded down, then a step each to the largest remainders, ties in order.

    No layer is left empty: it keeps one step at least.
    """
    whole = {name: max(math.floor(counts[name] / steps[name] + 1e-9), 1) * steps[name] for name in shapes}
    rest = kept - sum(whole.values())
    for name in sorted(shapes, key=lambda name: (whole[name] - counts[name]) / steps[name]):
        if 2 * rest >= steps[name] and whole[name] + steps[name] <= math.prod(shapes[name]):
            whole[name] += steps[name]
            rest -= steps[name]
    for name in sorted(shapes, key=lambda name: -whole[name]):  # what the smallest layers kept beyond their share
        while rest < 0 and -2 * rest >= steps[name] and whole[name] > steps[name]:
            whole[name] -= steps[name]
            rest += steps[name]
    return whole


def _with_count(pattern: Unstructured | Columns, shape: tuple[int, int], kept: int) -> Pattern:
    """The pattern with the shortest decimal sparsity that keeps exactly so many weights of a matrix."""
    exact = 1 - kept / math.prod(shape)
    for digits in range(1, 18):
        rounded = round(exact, digits)
        if rounded < 1 and (candidate := replace(pattern, sparsity=rounded)).num_kept(shape) == kept:
            return candidate
    raise AssertionError(f"no sparsity keeps {kept} of {shape}")


def mixture(
    shapes: Shapes,
    kept: int,
    wanted: Mapping[str, float],
    choices: Sequence[Pattern | None],
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> dict[str, Pattern | None]:
    """One of `choices` (None = dense) for every layer: of all ways to spend K to less than one step of the smallest
    layer, the one nearest to the wanted densities (sum of n times squared distances).

    Choices that do not fit a shape, or lie outside `bounds`, do not count for that layer; of two with one density the
    first wins.
    """
    options = {name: _options(name, shape, choices, bounds) for name, shape in shapes.items()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    counts = [[count for count, _ in found] for found in options.values()]
    picked = knapsack(counts, distances(counts, sizes, [wanted[name] for name in shapes]), kept, sum(sizes))
    return {name: found[index][1] for (name, found), index in zip(options.items(), picked, strict=True)}


def distances(counts: Sequence[Sequence[int]], sizes: Sequence[int], wanted: Sequence[float]) -> list[list[float]]:
    """n * (density - wanted)^2 of every option of every item."""
    return [[n * (count / n - wish) ** 2 for count in row] for row, n, wish in zip(counts, sizes, wanted, strict=True)]


def knapsack(counts: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], kept: int, total: int) -> list[int]:
    """One option for every item: of all sums of counts that are at most `kept`, and less than `smallest_step` below the
    largest such, the one of least cost.

    Dynamic programming over the budget in units of the counts' common divisor; ties go to more weights, then to the
    first option. `total` only words the error. Cost: items x options x MAX_STATES at most.
    """
    least = [min(row) for row in counts]
    room = kept - sum(least)
    if room < 0:
        raise PatternError(
            f"the sparsest choices give {1 - sum(least) / total:.4g} zeros in all, {1 - kept / total:.4g} were asked for; "
            "offer a sparser choice"
        )
    unit = math.gcd(*(count - low for row, low in zip(counts, least, strict=True) for count in row)) or 1
    unit *= -(-(room // unit + 1) // MAX_STATES)
    extra = [[-(-(count - low) // unit) for count in row] for row, low in zip(counts, least, strict=True)]
    states = min(room // unit, sum(map(max, extra))) + 1
    spent = np.full(states, np.inf)
    spent[0] = 0.0
    chosen = np.zeros((len(counts), states), dtype=np.int16)
    for item, (row, more) in enumerate(zip(costs, extra, strict=True)):
        best = np.full(states, np.inf)
        for option, (cost, units) in enumerate(zip(row, more, strict=True)):
            if units < states:
                through = spent[: states - units] + cost
                better = through < best[units:]
                best[units:][better] = through[better]
                chosen[item, units:][better] = option
        spent = best
    top = int(np.flatnonzero(np.isfinite(spent))[-1])
    near = spent[: top + 1][::-1][: max(1, -(-smallest_step(counts) // unit))]
    state = top - int(near.argmin())
    picked: list[int] = []
    for item in reversed(range(len(counts))):
        picked.append(int(chosen[item, state]))
        state -= extra[item][picked[-1]]
    return picked[::-1]


def smallest_step(counts: Sequence[Sequence[int]]) -> int:
    """The least difference between two neighbouring counts of one item; 0 if no item has two."""
    pairs = (pair for row in counts for pair in itertools.pairwise(sorted(set(row))))
    return min((high - low for low, high in pairs), default=0)


def _options(
    name: str, shape: tuple[int, int], choices: Sequence[Pattern | None], bounds: tuple[float, float]
) -> list[tuple[int, Pattern | None]]:
    """(weights kept, choice) of every choice that a layer may have."""
    n, found, reason = math.prod(shape), [], ""
    for choice in choices:
        try:
            if choice is not None:
                choice.check(shape)
        except PatternError as error:
            reason = f": {error}"
            continue
        count = n if choice is None else choice.num_kept(shape)
        if bounds[0] - 1e-9 <= count / n <= bounds[1] + 1e-9:
            found.append((count, choice))
    if not found:
        raise PatternError(f"layer {name}: none of the choices is allowed{reason}")
    return found


def check_shape(name: str, pattern: Pattern, shape: tuple[int, int]) -> None:
    """Raise PatternError, naming the layer, if a pattern does not fit it."""
    try:
        pattern.check(shape)
    except PatternError as error:
        raise PatternError(f"layer {name}: {error}") from None


def check_layer(name: str, pattern: Pattern | None, shape: tuple[int, int]) -> None:
    """`check_shape`, and raise it too if the pattern leaves nothing of the layer."""
    if pattern is not None:
        check_shape(name, pattern, shape)
        if pattern.num_kept(shape) == 0:
            raise PatternError(f"layer {name}: {pattern} leaves no weight of shape {shape}; a layer keeps at least one")
