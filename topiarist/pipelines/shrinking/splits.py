"""Ways to divide a number of parameters over the axes of a model: how wide, how deep, how many heads; channels fill up.

Everything here is known from shapes: models are without memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch

from topiarist.core.errors import PatternError, TopiaristError, UnsupportedModel
from topiarist.models.derive import has_row
from topiarist.pipelines.shrinking.cuts import Cut, check_scope, check_scored
from topiarist.pipelines.shrinking.options import ShrinkOptions
from topiarist.structured import UnitGroup, default_kinds, holds, layer_counts, plan_layout, units_of
from topiarist.structured.choose import kept_cost, step_of, total_cost
from topiarist.structured.units import HEAD_KINDS, HIDDEN
from topiarist.structured.width import accepts, empty_model, parameter_count, width_config

AXES = (HIDDEN, "block", *HEAD_KINDS)
"""Kinds of units whose number a split says; channels take what is left."""
SMALLEST = 0.5
"""Share of an axis below which no split goes: what is left of a model then is no longer the model."""
NEARLY = 0.9
"""Share of the target that a split must reach: channels go in steps, and what has fewer parameters is no fair rival."""


Split = dict[str, int]
"""Kind of units -> how many of them stay, of every axis but channels."""


class Splits:
    """The splits of one model that reach a number of parameters.

    model: without memory. kinds: the axes, channels among them. target: parameters of the whole model at most. Raises
    TopiaristError where no split can reach it.
    """

    def __init__(self, model: Any, kinds: Sequence[str], target: int, round_to: int | None) -> None:
        self.model, self.target, self.round_to = model, target, round_to
        self.kinds = tuple(kinds)
        self.dense = parameter_count(model)
        self._known: dict[tuple[int, ...], list[Cut] | None] = {}
        if "channels" not in kinds:
            raise TopiaristError(
                "a target of parameters needs channels among the units: they take what the others leave"
            )
        if target >= self.dense:
            raise PatternError(f"the model has {self.dense:,} parameters, no more than the target {target:,}: lower it")
        self.channels = units_of(model, ("channels",))[0].count
        self.axes = {kind: self._values(kind) for kind in AXES if kind in kinds}
        if not self.axes:
            raise TopiaristError(f"channels alone are no split: add units ({', '.join(AXES)}), or say --keep")
        start = next((split for split in self._starts() if self.cuts(split) is not None), None)
        if start is None:
            raise PatternError(
                f"no split over {', '.join(self.kinds)} reaches {target:,} parameters: raise the target, or add units"
            )
        self.start = start

    def of(self, target: int) -> Splits:
        """The splits of the same model that reach another number of parameters. Raises PatternError if there is none."""
        return Splits(self.model, self.kinds, target, self.round_to)

    def cuts(self, split: Split) -> list[Cut] | None:
        """What is to be cut for a split; None if it does not reach the target, or no config states it."""
        key = tuple(split[kind] for kind in self.axes)
        if key not in self._known:
            try:
                self._known[key] = self._planned(split)
            except (PatternError, UnsupportedModel):
                self._known[key] = None
        return self._known[key]

    def _starts(self) -> Iterator[Split]:
        """Splits to begin with: all from the channels, then from one axis beside them, then from all."""
        whole = {kind: values[0] for kind, values in self.axes.items()}
        yield whole
        for kind, values in self.axes.items():
            yield from (whole | {kind: count} for count in values[1:])
        for place in range(1, max(len(values) for values in self.axes.values())):
            yield {kind: values[min(place, len(values) - 1)] for kind, values in self.axes.items()}

    def _values(self, kind: str) -> list[int]:
        """Counts of an axis from all down to half, in steps of a sixteenth or more."""
        same = [group for group in units_of(self.model, (kind,)) if kind == "block" or group.block <= 0]
        count = len(same) if kind == "block" else same[0].count
        step = step_of(same[0], self.round_to) if kind == HIDDEN else max(1, count // 16)
        values = range(count // step * step, 0, -step)
        legal = {
            HIDDEN: lambda n: accepts(self.model, n),
            "block": lambda _: True,
        }.get(kind, lambda n: holds(self.model, same, n))
        return [count, *(n for n in values if SMALLEST * count <= n < count and legal(n))]

    def _planned(self, split: Split) -> list[Cut] | None:
        model, cuts, left = self.model, list[Cut](), self.target
        blocks = units_of(model, ("block",))
        share = split.get("block", len(blocks)) / len(blocks)
        width = int(model.config.hidden_size)
        if (count := split.get(HIDDEN, width)) < width:
            groups = units_of(model, (HIDDEN,))
            cuts.append(Cut(groups, {groups[0].place: count}, "per_layer", count / width))
            model = empty_model(width_config(model, count).config)
            blocks = units_of(model, ("block",))
        groups = units_of(model, [kind for kind in self.kinds if kind not in (HIDDEN, "block")])
        # Everything but these units, in the blocks that stay; then the units themselves, all blocks still there.
        left -= parameter_count(model) - (1 - share) * total_cost(blocks) - share * total_cost(groups)
        counts = self._counts(groups, split, left / share)
        if counts is None:
            return None
        zeros = {g.key: torch.arange(g.count) < counts[g.place] for g in groups}
        keep = kept_cost(groups, zeros) / total_cost(groups)
        reached = self.target - left + share * kept_cost(groups, zeros)
        if reached < NEARLY * self.target:
            return None
        plan = plan_layout(model, groups, zeros, "uniform")
        if keep < 1:
            cuts.append(Cut(groups, counts, "per_layer", keep))
        if share < 1:
            last = units_of(empty_model(plan.config), ("block",))
            cuts.append(Cut(last, None, "per_layer", share))
        return cuts

    def _counts(self, groups: Sequence[UnitGroup], split: Split, budget: float) -> dict[str, int] | None:
        """{place: count}: what the split says, and as many channels as the budget of parameters then allows."""
        fixed = {g.place: split.get(g.kind, g.count) for g in groups if g.kind != "channels"}
        channels = [group for group in groups if group.kind == "channels"]
        budget -= sum(g.cost * fixed[g.place] for g in groups if g.kind != "channels")
        share = min(1.0, budget / total_cost(channels))
        if share < SMALLEST:
            return None
        return fixed | layer_counts(channels, share, self.round_to)


def plan_splits(model: Any, options: ShrinkOptions) -> Splits:
    """The splits that reach `target_params`, on a model without memory; for a target of latency, those nearest the whole.

    Raises TopiaristError for all that can be refused.
    """
    flag = "--target-params" if options.target_params is not None else "--target-latency"
    if not has_row(model):
        raise TopiaristError(
            f"a split over the axes of model type {model.config.model_type!r} needs a row of topiarist.models.FAMILIES: say "
            f"--keep instead of {flag}"
        )
    if options.layout != "uniform":
        raise TopiaristError(f"a split over the axes is one for all layers: {flag} needs --layout uniform")
    check_scope(options.layout, options.scope)
    kinds = tuple(options.units or (*_wide(model), *default_kinds(model)))
    if other := [kind for kind in kinds if kind not in (*AXES, "channels")]:
        raise TopiaristError(
            f"a split is over {', '.join(AXES)} and channels: leave {other[0]} out of the units, or say --keep instead"
        )
    check_scored(options.chosen_method, [kind for kind in kinds if kind != "block"])
    return Splits(model, kinds, options.target_params or int(NEARLY * parameter_count(model)), options.round_to)


def _wide(model: Any) -> tuple[str, ...]:
    """The hidden states, where a config can state fewer of them."""
    with suppress(UnsupportedModel):
        return tuple(group.kind for group in units_of(model, (HIDDEN,)))
    return ()
