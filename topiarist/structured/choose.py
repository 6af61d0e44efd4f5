"""Which units stay: exact top-k under a budget of parameters, with fixed ties.

Units of a group are sorted by score and cut into steps of `round_to`; a group always keeps whole steps from its best
one down, so that rounding is part of the choice and not a repair afterwards. Groups that must keep the same count (one
`tie`, or one `place` in a uniform layout) move step by step together, by the mean of their scores.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from topiarist.core.errors import NumericalError, PatternError
from topiarist.structured.units import DEPTH_KINDS, HIDDEN, Kept, UnitGroup

SCOPES = ("global", "per_layer", "parameters")
ROUND_TO = 64
"""Channels; for narrow layers the largest power of two that is at most a sixteenth of their width, and at least 8."""
LEAST = 8
"""Grouped matrix products want rows of a multiple of 16 bytes."""


def choose(
    groups: Sequence[UnitGroup],
    scores: Mapping[str, Tensor],
    keep: float,
    *,
    scope: str = "global",
    round_to: int | None = None,
    counts: Mapping[str, int] | None = None,
) -> Kept:
    """Keep the units with the highest scores, at most `keep` of the parameters that all units hold.

    scores: group key -> (count,), higher = keep. scope:
    "global"      every kind keeps its own share of its parameters, the best units of all layers
    "parameters"  one budget for all kinds: scores must compare between kinds
    "per_layer"   the same count in every layer: `counts` (place -> count) or those of `layer_counts`
    Equal scores: the earlier group, the lower index. Raises PatternError if the floors alone exceed the budget, and
    NumericalError for a score that is not a number.
    """
    check_keep(keep)
    _check_scores(groups, scores)
    if scope not in SCOPES:
        raise PatternError(f"unknown scope {scope!r}; choose one of {', '.join(SCOPES)}")
    ladders = [_Ladder(tied, scores, round_to) for tied in _tied(groups, "tie")]
    if scope == "per_layer":
        counts = counts or layer_counts(groups, keep, round_to)
        depth = [ladder for ladder in ladders if ladder.groups[0].kind in DEPTH_KINDS]
        for ladder in ladders:
            if ladder not in depth:
                ladder.taken = ladder.units_to_steps(counts[ladder.groups[0].place])
        pools = [depth]
    else:
        kinds = [None] if scope == "parameters" else dict.fromkeys(group.kind for group in groups)
        pools = [[x for x in ladders if kind in (None, x.groups[0].kind)] for kind in kinds]
    for pool in pools:
        _fill(pool, keep)
    kept: Kept = {}
    for ladder in ladders:
        kept |= ladder.kept()
    kept = {group.key: kept[group.key] for group in groups}
    if not any(bool(mask.any()) for mask in kept.values()):
        raise PatternError(f"keep {keep} leaves nothing of the units; raise it")
    verify_budget(groups, kept, keep)
    return kept


def layer_counts(
    groups: Sequence[UnitGroup],
    keep: float,
    round_to: int | None = None,
    legal: Callable[[str, int], bool] = lambda place, count: True,
) -> dict[str, int]:
    """{place: units that every group of it keeps}: the same for all layers, whatever the scores, within the budget.

    Coarse units (heads) are rounded up to a legal count, and the finest (channels) fill what remains of `keep`: on the
    demo model at 0.8 two of three KV heads everywhere cost far more than the channels that pay for the third.
    """
    check_keep(keep)
    places = _tied([group for group in groups if group.kind not in DEPTH_KINDS], "place")
    ladders = [_Ladder(place, None, round_to) for place in places]
    ladders.sort(key=lambda ladder: -ladder.step_cost(ladder.floor_steps))
    budget = keep * sum(ladder.cost(len(ladder.sizes)) for ladder in ladders)
    counts: dict[str, int] = {}
    for number, ladder in enumerate(ladders):
        place, last = ladder.groups[0].place, number == len(ladders) - 1
        reserve = sum(later.cost(later.floor_steps) for later in ladders[number + 1 :])
        wanted = budget if last else keep * ladder.cost(len(ladder.sizes))
        options = [
            steps
            for steps in range(ladder.floor_steps, len(ladder.sizes) + 1)
            if ladder.cost(steps) + reserve <= budget * (1 + 1e-12) and legal(place, ladder.units(steps))
        ]
        if not options:
            raise PatternError(
                f"keep {keep} leaves room for no legal number of {ladder.groups[0].kind} ({place}): raise keep, lower "
                "round_to, or cut other units"
            )
        enough = [steps for steps in options if ladder.cost(steps) >= wanted * (1 - 1e-12)]
        best = max(options) if last or not enough else min(enough)
        counts[place] = ladder.units(best)
        budget -= ladder.cost(best)
    return counts


def check_keep(keep: float) -> None:
    """Raise PatternError unless the share is in (0, 1]."""
    if not 0 < keep <= 1:
        raise PatternError(f"keep {keep} must be in (0, 1]: the share of parameters that stays")


def kept_cost(groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> int:
    """Parameters of the units that stay."""
    return sum(group.cost * int(kept[group.key].sum()) for group in groups)


def total_cost(groups: Sequence[UnitGroup]) -> int:
    """Parameters of all units together."""
    return sum(group.cost * group.count for group in groups)


def verify_budget(groups: Sequence[UnitGroup], kept: Mapping[str, Tensor], keep: float) -> None:
    """Raises PatternError if more parameters stay than the budget allows, or a floor is broken."""
    if kept_cost(groups, kept) > keep * total_cost(groups) * (1 + 1e-9):
        raise PatternError(
            f"the floors alone keep {kept_cost(groups, kept):,} of {total_cost(groups):,} parameters, more than {keep}: "
            "raise keep, or lower round_to"
        )
    for group in groups:
        if int(kept[group.key].sum()) < group.floor:
            raise PatternError(f"{group.key} keeps fewer than {group.floor}")


def step_of(group: UnitGroup, round_to: int | None) -> int:
    """Units of a step: 1 for all but channels, of a feed-forward layer and of the hidden states."""
    if group.kind not in ("channels", HIDDEN):
        return 1
    if round_to is None:
        narrow = max(min(LEAST, group.count), group.count // 16)
        return min(ROUND_TO, 1 << (narrow.bit_length() - 1))
    if not 1 <= round_to <= group.count:
        raise PatternError(f"round_to {round_to} does not fit {group.key} with {group.count} channels")
    if group.tie != group.key and round_to % LEAST:
        raise PatternError(f"channels of fused experts must be cut in multiples of {LEAST}, not {round_to}")
    return round_to


@dataclass
class _Ladder:
    """Groups that keep the same count, as steps from the best units to the worst."""

    groups: Sequence[UnitGroup]
    scores: Mapping[str, Tensor] | None
    round_to: int | None
    taken: int = 0
    sizes: list[int] = field(init=False)
    sums: list[int] = field(init=False)
    """Units of so many steps."""
    unit_cost: int = field(init=False)
    """Parameters that go with a unit of every group."""
    means: list[float] = field(init=False, default_factory=list)
    order: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        first = self.groups[0]
        step = step_of(first, self.round_to)
        self.sizes = [min(step, first.count - start) for start in range(0, first.count, step)]
        self.sums = [0, *accumulate(self.sizes)]
        self.unit_cost = sum(group.cost for group in self.groups)
        self.floor_steps = self.units_to_steps(first.floor)
        self.taken = self.floor_steps
        if self.scores is None:
            return
        values = [self.scores[group.key].detach().double().cpu() for group in self.groups]
        self.order = [torch.argsort(-value, stable=True) for value in values]
        ranked = torch.stack([value[order] for value, order in zip(values, self.order, strict=True)]).mean(0)
        steps = [float(part.mean()) for part in ranked.split(self.sizes)]
        # Falling but for rounding; a later step never comes before an earlier one.
        self.means = list(accumulate(steps, min))

    def units(self, steps: int) -> int:
        return self.sums[steps]

    def units_to_steps(self, units: int) -> int:
        """The fewest steps that hold so many units."""
        return bisect_left(self.sums, units)

    def step_cost(self, step: int) -> int:
        return self.cost(step + 1) - self.cost(step) if step < len(self.sizes) else 0

    def cost(self, steps: int) -> int:
        return self.unit_cost * self.sums[steps]

    def kept(self) -> Kept:
        """The masks of its groups."""
        masks = {}
        for group, order in zip(self.groups, self.order, strict=True):
            masks[group.key] = torch.zeros(group.count, dtype=torch.bool)
            masks[group.key][order[: self.units(self.taken)]] = True
        return masks


def _fill(pool: Sequence[_Ladder], keep: float) -> None:
    """Take steps of the highest scores until none fits any more."""
    budget = keep * sum(ladder.cost(len(ladder.sizes)) for ladder in pool) * (1 + 1e-12)
    spent = sum(ladder.cost(ladder.taken) for ladder in pool)
    steps = [
        (-ladder.means[step], number, step)
        for number, ladder in enumerate(pool)
        for step in range(ladder.taken, len(ladder.sizes))
    ]
    closed: set[int] = set()
    for _, number, step in sorted(steps):
        cost = pool[number].step_cost(step)
        if number in closed or spent + cost > budget:
            closed.add(number)  # its later steps are of no higher score, and stand on this one
            continue
        pool[number].taken = step + 1
        spent += cost


def _tied(groups: Sequence[UnitGroup], by: str) -> list[list[UnitGroup]]:
    found: dict[str, list[UnitGroup]] = {}
    for group in groups:
        found.setdefault(getattr(group, by), []).append(group)
    return list(found.values())


def _check_scores(groups: Sequence[UnitGroup], scores: Mapping[str, Tensor]) -> None:
    for group in groups:
        score = scores.get(group.key)
        if score is None or score.shape != (group.count,):
            raise ValueError(
                f"{group.key} needs {group.count} scores, got {None if score is None else tuple(score.shape)}"
            )
        if bool(torch.isnan(score).any()):
            raise NumericalError(f"a score of {group.key} is not a number; more calibration text may help")
