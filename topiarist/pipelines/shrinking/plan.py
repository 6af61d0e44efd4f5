"""What a structural run will cut, and all refusals that can be known before any work is done."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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
from topiarist.structured.units import HEAD_KINDS, WIDTH_KINDS, check_kinds


def plan_choice(
    model: Any,
    method: Method,
    keep: float,
    layout: str,
    units: Sequence[str] | None,
    scope: str | None,
    round_to: int | None,
    notes: list[str],
) -> tuple[list[UnitGroup], dict[str, int] | None, str]:
    """(groups, counts of a uniform layout, scope): all that can be refused is refused here, on a model without memory."""
    kinds = tuple(units) if units else tuple(k for k in default_kinds(model) if k in method.kinds) or method.kinds[:1]
    kinds = check_kinds(kinds)
    if unfit := [kind for kind in kinds if kind not in method.kinds]:
        raise TopiaristError(f"{name_of(METHODS, method)} cannot score {unfit[0]}; it scores {', '.join(method.kinds)}")
    check_layout(layout, kinds)
    groups = units_of(model, kinds)
    if inexact := [group.key for group in groups if not group.exact]:
        remember(
            notes,
            f"a norm of {inexact[0].rpartition('.')[0]} spans all heads: without some of them it sees other statistics, "
            "and the result is not exactly the masked model",
        )
    if layout == "uniform" and scope not in (None, "per_layer"):
        raise PatternError(f"a uniform layout keeps the same count in every layer: scope {scope} needs --layout hetero")
    scope = "per_layer" if layout == "uniform" else scope or method.scope
    counts = None
    if scope == "per_layer" and any(group.kind in WIDTH_KINDS for group in groups):
        counts = layer_counts(groups, keep, round_to)
        if layout == "uniform":
            legal = Legal(model, groups, keep)
            snapped = layer_counts(groups, keep, round_to, legal)
            for place in (place for place in counts if legal.known and counts[place] != snapped[place]):
                remember(
                    notes,
                    f"{place} keeps {snapped[place]} instead of {counts[place]}: what a {_type(model)} config allows",
                )
            counts = snapped
    zeros = {group.key: torch.zeros(group.count) for group in groups}
    trial = choose(groups, zeros, keep, scope=scope, round_to=round_to, counts=counts)
    plan_layout(model, groups, trial, layout, max_waste=float("inf"))
    return groups, counts, scope


class Legal:
    """Whether a config can hold so many units of a place; asked of transformers for heads only: a config holds any number
    of experts or none but its own, which the plan of the whole cut shows.

    keep: share of parameters that stays; below 1, raises UnsupportedModel for a place where no fewer units can be held.
    """

    def __init__(self, model: Any, groups: Sequence[UnitGroup], keep: float) -> None:
        self.model, self.known = model, {}
        self.places: dict[str, list[UnitGroup]] = {}
        for group in groups:
            if group.kind in HEAD_KINDS:
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
