"""What a structural run will cut, and all refusals that can be known before any work is done."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from topiarist.core.errors import CheckpointError, PatternError, TopiaristError, UnsupportedModel
from topiarist.core.registry import name_of
from topiarist.models.modeling_pruned import PREFIX
from topiarist.structured import (
    METHODS,
    Method,
    UnitGroup,
    check_layout,
    choose,
    default_kinds,
    holds,
    layer_counts,
    plan_layout,
    units_of,
)
from topiarist.structured.choose import total_cost
from topiarist.structured.metrics import BlockInfluence
from topiarist.structured.rotation import check_rotation
from topiarist.structured.units import DEPTH_KINDS, HEAD_KINDS, HIDDEN, check_kinds
from topiarist.structured.width import empty_model, width_config


@dataclass(frozen=True)
class Cut:
    """Units that go together. The hidden states go by themselves and first: all other units are then smaller."""

    groups: list[UnitGroup]
    counts: dict[str, int] | None
    """Of a uniform layout: place -> units that every group of it keeps."""
    scope: str
    keep: float
    """Share of these units' parameters that stays."""


def scorer_of(method: Method, kind: str) -> Method:
    """The method, or block influence for blocks that it cannot score."""
    return method if kind in method.kinds else BlockInfluence()


def check_scored(method: Method, kinds: Sequence[str]) -> None:
    """Raise TopiaristError for a kind of units that the method has no score for."""
    if unfit := [kind for kind in kinds if kind not in method.kinds]:
        raise TopiaristError(f"{name_of(METHODS, method)} cannot score {unfit[0]}; it scores {', '.join(method.kinds)}")


def check_scope(layout: str, scope: str | None) -> None:
    """Raise PatternError for a scope that the layout has no choice of."""
    if layout == "uniform" and scope not in (None, "per_layer"):
        raise PatternError(f"a uniform layout keeps the same count in every layer: scope {scope} needs --layout hetero")


def plan_cuts(
    model: Any,
    method: Method,
    keep: float,
    layout: str,
    units: Sequence[str] | None,
    scope: str | None,
    round_to: int | None,
    notes: list[str],
) -> list[Cut]:
    """What will be cut, in order: all that can be refused is refused here, on a model without memory.

    The hidden states beside other units lose as large a share of their channels as these then do of theirs: the parameters
    of a matrix are a product of both.
    """
    kinds = tuple(units or ())
    if not kinds:
        usual = method.kinds if len(method.kinds) == 1 else default_kinds(model)
        kinds = tuple(k for k in usual if k in method.kinds) or method.kinds[:1]
    kinds = check_kinds(kinds)
    check_scored(method, kinds)
    check_layout(layout, kinds)
    check_scope(layout, scope)
    others = tuple(kind for kind in kinds if kind != HIDDEN)
    if HIDDEN not in kinds or not others:
        return [_plan_cut(model, keep, layout, kinds, scope or method.scope, scope, round_to, notes)]
    width = _plan_cut(model, keep**0.5, layout, (HIDDEN,), method.scope, scope, round_to, notes)
    narrow = empty_model(width_config(model, next(iter((width.counts or {}).values()))).config)
    before, after = (units_of(one, (HIDDEN,)) for one in (model, narrow))
    rest = units_of(narrow, others)
    alone = _outside(narrow, rest, before)
    left = keep * (total_cost(before) + alone) - (total_cost(after) + alone - total_cost(rest))
    if left <= 0:
        raise PatternError(f"keep {keep} leaves nothing of {', '.join(others)}: raise it, or cut fewer kinds of units")
    share = min(1.0, left / total_cost(rest))
    return [width, _plan_cut(narrow, share, layout, others, method.scope, scope, round_to, notes)]


def _outside(model: Any, groups: Sequence[UnitGroup], hidden: Sequence[UnitGroup]) -> int:
    """Parameters of units that are no part of the hidden states: biases of heads and channels."""
    within, total = {part.parameter for group in hidden for part in group.parts}, 0
    for group in groups:
        for part in (part for part in group.parts if part.parameter not in within):
            shape = model.get_parameter(part.parameter).shape
            total += group.count * part.size * (shape.numel() // shape[part.axis])
    return total


def _plan_cut(
    model: Any,
    keep: float,
    layout: str,
    kinds: Sequence[str],
    default_scope: str,
    scope: str | None,
    round_to: int | None,
    notes: list[str],
) -> Cut:
    groups = units_of(model, kinds)
    if inexact := [group for group in groups if not group.exact]:
        what = (
            "the layer norms take the mean of the hidden channels: of fewer it is another"
            if inexact[0].kind == HIDDEN
            else f"a norm of {inexact[0].key.rpartition('.')[0]} spans all heads: without some of them it sees other statistics"
        )
        remember(notes, f"{what}, and the result is not exactly the masked model")
    scope = "per_layer" if layout == "uniform" else scope or default_scope
    counts = None
    if scope == "per_layer" and any(group.kind not in DEPTH_KINDS for group in groups):
        counts = layer_counts(groups, keep, round_to)
        if layout == "uniform":
            allowed = AllowedCounts(model, groups, keep)
            snapped = layer_counts(groups, keep, round_to, allowed)
            for place in (place for place in counts if allowed.known and counts[place] != snapped[place]):
                remember(
                    notes,
                    f"{place} keeps {snapped[place]} instead of {counts[place]}: what a {_type(model)} config allows",
                )
            counts = snapped
    zeros = {group.key: torch.zeros(group.count) for group in groups}
    trial = choose(groups, zeros, keep, scope=scope, round_to=round_to, counts=counts)
    plan_layout(model, groups, trial, layout, max_waste=float("inf"))
    return Cut(groups, counts, scope, keep)


class AllowedCounts:
    """Whether a config can hold so many units of a place; asked of transformers for heads and hidden states only: a config
    holds any number of experts or none but its own, which the plan of the whole cut shows.

    keep: share of parameters that stays; below 1, raises UnsupportedModel for a place where no fewer units can be held.
    """

    def __init__(self, model: Any, groups: Sequence[UnitGroup], keep: float) -> None:
        self.model, self.known = model, {}
        self.places: dict[str, list[UnitGroup]] = {}
        for group in groups:
            if group.kind in (*HEAD_KINDS, HIDDEN):
                self.places.setdefault(group.place, []).append(group)
        for place, same in self.places.items():
            if keep < 1 and not any(self(place, count) for count in range(same[0].floor, same[0].count)):
                kept = {g.key: torch.arange(g.count) < g.count - 1 for g in same}
                plan_layout(model, same, kept, "uniform")  # raises, and says why
                raise UnsupportedModel(f"no {_type(model)} config can hold fewer {same[0].kind}: choose other --units")

    def __call__(self, place: str, count: int) -> bool:
        """Whether `count` units in every group of a place make a config that transformers takes; asked once a count."""
        if place not in self.places or count == self.places[place][0].count:
            return True
        if (place, count) not in self.known:
            self.known[place, count] = holds(self.model, self.places[place], count)
        return self.known[place, count]


def check_rotate(model: Any, kinds: Sequence[str]) -> None:
    """Raise TopiaristError if the hidden states cannot be rotated, or are not cut at all."""
    if HIDDEN not in kinds:
        raise TopiaristError("rotate turns the hidden states: add hidden to the units, or leave it out")
    check_rotation(model, units_of(model, (HIDDEN,))[0])


def remember(notes: list[str], message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of something once, and keep it in `notes`."""
    if message not in notes:
        notes.append(message)
        warnings.warn(message, category, stacklevel=3)


def refuse_pruned(config: Any, name: str) -> None:
    """Uniform results are models like any other; what else was pruned cannot be cut without breaking what it claims."""
    known = getattr(config, "pruning_config", None) or {}
    layout = known.get("structured", {}).get("layout")
    if str(config.model_type).startswith(PREFIX) or (known and layout != "uniform"):
        what = f"{known.get('method', 'pruned')} {known.get('pattern', '')}".strip()
        raise CheckpointError(
            f"{name} is already pruned ({what}): cutting units would break that; shrink its base "
            f"{known.get('base_model', '')!r}, then prune the result"
        )


def _type(model: Any) -> str:
    return str(model.config.model_type)
