"""In which form a cut model is saved, and whether its family can hold that form: known before any work is done.

| layout | shapes | opens with |
|---|---|---|
| masked | as before, zeros in them | anything |
| uniform | every layer the same, smaller | anything |
| padded | every layer that of the widest, zeros in the others | anything |
| hetero | every layer its own | `trust_remote_code`, or `topiarist.load_pruned` |
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from topiarist.core.errors import TopiaristError, UnsupportedModel
from topiarist.models.building import rebuilt
from topiarist.models.derive import family_of
from topiarist.models.families import Family
from topiarist.structured.configs import absent_modules, hetero_config, stock_config
from topiarist.structured.cut import cut_state
from topiarist.structured.units import DEPTH_KINDS, HIDDEN, Kept, UnitGroup
from topiarist.structured.width import accepts, rescale, width_config

LAYOUTS = ("uniform", "padded", "hetero", "masked")
MAX_WASTE = 0.1
"""Of a padded layout: zeros that only fill up, as a share of the parameters that are kept."""


@dataclass(frozen=True)
class Plan:
    """How the result will be stored."""

    layout: str
    config: Any
    slots: dict[str, int]
    """Group key -> units that there is room for."""
    blocks: list[int]
    """Old numbers of the blocks that stay."""
    warnings: list[str] = field(default_factory=list)


def check_layout(layout: str, kinds: Iterable[str]) -> None:
    """Raises TopiaristError for a layout that cannot hold a kind of unit in any family."""
    if layout not in LAYOUTS:
        raise TopiaristError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if layout == "uniform" and (sublayers := {"attention", "ffn"} & set(kinds)):
        raise TopiaristError(
            f"no stock model leaves out single sublayers ({min(sublayers)}): choose --layout hetero or masked, or --units block"
        )
    if layout != "uniform" and HIDDEN in kinds:
        raise TopiaristError("the hidden states are as wide in every layer: --units hidden needs --layout uniform")
    if layout in ("masked", "padded") and "experts" in kinds:
        raise TopiaristError(
            f"zeros do not keep a router from choosing an expert: --layout {layout} cannot hold this cut"
        )
    if layout == "padded" and set(kinds) & set(DEPTH_KINDS):
        raise TopiaristError("there is nothing to pad in whole sublayers and blocks: choose another layout")


def plan_layout(
    model: Any,
    groups: Sequence[UnitGroup],
    kept: Kept,
    layout: str,
    *,
    max_waste: float = MAX_WASTE,
    biased: Collection[str] = (),
) -> Plan:
    """The config and shapes of the result. biased: consumers that must have a bias in it.

    Raises UnsupportedModel if the family cannot hold it.
    """
    check_layout(layout, {group.kind for group in groups})
    family = family_of(model)
    count = len(model.get_submodule(family.blocks))
    gone = {group.block for group in groups if group.kind == "block" and not bool(kept[group.key].all())}
    blocks = [i for i in range(count) if i not in gone or layout == "masked"]
    units = {group.key: int(kept[group.key].sum()) for group in groups}
    if layout == "masked":
        slots = {group.key: group.count for group in groups}
        dense = {group.place: group.count for group in groups}
        config = stock_config(model, groups, dense, blocks, biased)[0] if biased else model.config
        return Plan(layout, config, slots, blocks)
    if layout == "hetero" and not any(group.kind == "block" for group in groups):  # those open anywhere as they are
        return Plan(layout, hetero_config(model, groups, kept, units, biased), units, blocks)
    by_place: dict[str, list[UnitGroup]] = {}
    for group in groups:
        if group.kind not in DEPTH_KINDS:
            by_place.setdefault(group.place, []).append(group)
    widest = {place: max(units[g.key] for g in same) for place, same in by_place.items()}
    if layout == "uniform" and any(units[g.key] != widest[p] for p, same in by_place.items() for g in same):
        raise TopiaristError("layers differ in size: --layout uniform wants the same count in each (scope per_layer)")
    if layout == "padded":
        widest = {
            p: next(n for n in range(widest[p], s[0].count + 1) if holds(model, s, n)) for p, s in by_place.items()
        }
    slots = {group.key: widest.get(group.place, units[group.key]) for group in groups}
    if layout == "padded":
        _check_waste(groups, units, slots, max_waste)
    config, warnings = _config(model, groups, widest, blocks, biased)
    return Plan(layout, config, slots, blocks, warnings)


def _config(
    model: Any,
    groups: Sequence[UnitGroup],
    widest: Mapping[str, int],
    blocks: Sequence[int],
    biased: Collection[str] = (),
) -> tuple[Any, list[str]]:
    if not any(group.kind == HIDDEN for group in groups):
        return stock_config(model, groups, widest, blocks, biased)
    if len(groups) > 1:
        raise TopiaristError("the hidden states are cut by themselves, and the units of the narrower model afterwards")
    found = width_config(model, widest[groups[0].place])
    return found.config, found.warnings


def holds(model: Any, same: Sequence[UnitGroup], count: int) -> bool:
    """Whether the family's config can state `count` units in every group of one place."""
    if same[0].kind == HIDDEN:
        return accepts(model, count)
    if same[0].stated:
        blocks, groups = range(len(model.get_submodule(family_of(model).blocks))), same
    else:
        blocks, groups = [same[0].block], [group for group in same if group.block == same[0].block]
    try:
        stock_config(model, groups, {same[0].place: count}, list(blocks))
    except UnsupportedModel:
        return False
    return True


def _check_waste(
    groups: Sequence[UnitGroup], units: Mapping[str, int], slots: Mapping[str, int], max_waste: float
) -> None:
    kept = sum(group.cost * units[group.key] for group in groups)
    padded = sum(group.cost * slots[group.key] for group in groups)
    if padded > kept * (1 + max_waste):
        raise TopiaristError(
            f"padding to the widest layer stores {padded:,} parameters for {kept:,} that are kept, "
            f"{padded / kept - 1:.0%} more (limit {max_waste:.0%}): choose --layout hetero or uniform, or raise --max-waste"
        )


def shrunk(
    model: Any, groups: Sequence[UnitGroup], kept: Kept, plan: Plan, biases: Mapping[str, Tensor] = MappingProxyType({})
) -> Any:
    """A new model of the plan's shapes, which computes what `model` computes without the units that go.

    biases: {consumer: what is added to its bias}, of those that the plan was made for. Tensors that are not cut are
    shared with `model`, which stays as it is.
    """
    family = family_of(model)
    absent = [path for path, _ in absent_modules(groups, kept, family)] if plan.layout == "hetero" else []
    state = _renumbered(cut_state(model.state_dict(), groups, kept, plan.slots, absent), family, plan.blocks)
    new = rebuilt(model, plan.config, dtype=next(model.parameters()).dtype, buffers=False)
    if groups and groups[0].kind == HIDDEN:
        state = rescale(state, model, new, groups[0].parts, groups[0].count, plan.slots[groups[0].key])
    for name, parameter in new.named_parameters():
        if biases and name.endswith(".bias") and name not in state:
            state[name] = torch.zeros(parameter.shape, dtype=parameter.dtype)
    for consumer, bias in biases.items():
        name = f"{consumer}.bias"
        state[name] = (state[name].float() + bias.to(state[name].device)).to(state[name].dtype)
    _check_fits(state, new)
    new.load_state_dict(state, assign=True)
    new.tie_weights()
    new.generation_config = model.generation_config
    return new.to(next(model.parameters()).device).eval().requires_grad_(False)


def _check_fits(state: Mapping[str, Tensor], new: Any) -> None:
    """Raise UnsupportedModel for the first tensor that the model of the new config holds otherwise."""
    found, wanted = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (state, new.state_dict()))
    for name in sorted(found.keys() | wanted.keys()):
        if (cut := found.get(name, "missing")) != (asked := wanted.get(name, "none")):
            raise UnsupportedModel(f"{name} would be {cut}, and its config asks for {asked}: choose other --units")


def _renumbered(state: dict[str, Tensor], family: Family, blocks: Sequence[int]) -> dict[str, Tensor]:
    """Only the blocks that stay, counted anew."""
    new_number = {str(old): str(new) for new, old in enumerate(blocks)}
    result = {}
    for name, tensor in state.items():
        if name.startswith(f"{family.blocks}."):
            number, _, rest = name.removeprefix(f"{family.blocks}.").partition(".")
            if number in new_number:
                result[f"{family.blocks}.{new_number[number]}.{rest}"] = tensor
        else:
            result[name] = tensor
    return result
