"""In which form a cut model is saved, and whether its family can hold that form: known before any work is done.

| layout | shapes | opens with |
|---|---|---|
| masked | as before, zeros in them | anything |
| uniform | every layer the same, smaller | anything |
| padded | every layer that of the widest, zeros in the others | anything |
| hetero | every layer its own | `trust_remote_code`, or `topiarist.load_pruned` |

Whether a config can hold a shape is asked of transformers itself: a model without memory is built from it, and its
shapes are compared with those of the cut. Families thus need no table of what they accept.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from topiarist import modeling_pruned
from topiarist.errors import TopiaristError, UnsupportedModel
from topiarist.models import Family, family_of
from topiarist.structured.shrink import cut_state
from topiarist.structured.units import DEPTH_KINDS, Kept, UnitGroup

LAYOUTS = ("uniform", "padded", "hetero", "masked")
MAX_WASTE = 0.1
"""Of a padded layout: zeros that only fill up, as a share of the parameters that are kept."""


_REFUSALS = (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError, ArithmeticError)
"""What configs and modelling code raise for numbers that they cannot hold."""


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


def absent_modules(groups: Sequence[UnitGroup], kept: Kept, family: Family) -> list[tuple[str, str]]:
    """(module, "attention", "ffn" or "inside") of every sublayer that goes."""
    found = []
    for group in groups:
        if group.kind in ("attention", "ffn") and not bool(kept[group.key].all()):
            path = f"{family.blocks}.{group.block}"
            modules = (family.attention.module,) if group.kind == "attention" else family.feed_forward[0].modules
            found += [(f"{path}.{name}", "inside") for name in modules[:-1]] + [(f"{path}.{modules[-1]}", group.kind)]
    return found


def check_layout(layout: str, kinds: Iterable[str]) -> None:
    """Raises TopiaristError for a layout that cannot hold a kind of unit in any family."""
    if layout not in LAYOUTS:
        raise TopiaristError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if layout == "uniform" and (sublayers := {"attention", "ffn"} & set(kinds)):
        raise TopiaristError(
            f"no stock model leaves out single sublayers ({min(sublayers)}): choose --layout hetero or masked, or --units block"
        )
    if layout in ("masked", "padded") and "experts" in kinds:
        raise TopiaristError(
            f"zeros do not keep a router from choosing an expert: --layout {layout} cannot hold this cut"
        )
    if layout == "padded" and set(kinds) & set(DEPTH_KINDS):
        raise TopiaristError("there is nothing to pad in whole sublayers and blocks: choose another layout")


def plan_layout(
    model: Any, groups: Sequence[UnitGroup], kept: Kept, layout: str, *, max_waste: float = MAX_WASTE
) -> Plan:
    """The config and shapes of the result. Raises UnsupportedModel if the family cannot hold it."""
    check_layout(layout, {group.kind for group in groups})
    family = family_of(model.config.model_type)
    count = len(model.get_submodule(family.blocks))
    gone = {group.block for group in groups if group.kind == "block" and not bool(kept[group.key].all())}
    blocks = [i for i in range(count) if i not in gone or layout == "masked"]
    units = {group.key: int(kept[group.key].sum()) for group in groups}
    if layout == "masked":
        return Plan(layout, model.config, {group.key: group.count for group in groups}, blocks)
    if layout == "hetero" and not any(group.kind == "block" for group in groups):  # those open anywhere as they are
        return Plan(layout, _hetero_config(model, groups, kept, units), units, blocks)
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
    slots = {group.key: widest.get(group.place, group.count) for group in groups}
    if layout == "padded":
        _check_waste(groups, units, slots, max_waste)
    config, warnings = _uniform_config(model, groups, widest, blocks)
    return Plan(layout, config, slots, blocks, warnings)


def holds(model: Any, same: Sequence[UnitGroup], count: int) -> bool:
    """Whether the family's config can state `count` units in every group of one place."""
    try:
        one_layer = [group for group in same if group.block == same[0].block]
        _uniform_config(model, one_layer, {same[0].place: count}, [same[0].block])
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


def _uniform_config(
    model: Any, groups: Sequence[UnitGroup], widest: Mapping[str, int], blocks: Sequence[int]
) -> tuple[Any, list[str]]:
    """The stock config of the given widths; the family's own, or that of the type it may be relabelled to."""
    family = family_of(model.config.model_type)
    expected = _expected_shapes(model, family, groups, widest, blocks)
    reasons = []
    for target in filter(None, (model.config.model_type, family.relabel)):
        try:
            config = _edited(model, family, groups, widest, blocks, target)
            if (found := _shapes(config, family, [str(i) for i in range(len(blocks))])) != expected:
                wrong = next(name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name))
                raise ValueError(f"{wrong} would be {found.get(wrong)}, not {expected.get(wrong)}")
        except _REFUSALS as error:
            reasons.append(f"{target}: {' '.join(str(error).split())}")
            continue
        if target == model.config.model_type:
            return config, []
        return config, [
            f"saved as {target}, which computes the same: a {model.config.model_type} config refuses "
            f"{config.num_attention_heads} heads of {config.head_dim} at width {config.hidden_size}"
        ]
    what = ", ".join(f"{count} {place.rsplit(':', 1)[1]}" for place, count in widest.items())
    raise UnsupportedModel(
        f"a {model.config.model_type} config cannot hold {what or f'{len(blocks)} blocks'} ({reasons[-1]}): choose other "
        "--units, or --layout hetero"
    )


def _edited(
    model: Any,
    family: Family,
    groups: Sequence[UnitGroup],
    widest: Mapping[str, int],
    blocks: Sequence[int],
    target: str,
) -> Any:
    """The config with new numbers, through its own constructor and its checks."""
    config = _with_blocks(copy.deepcopy(model.config), blocks)
    per_group = config.num_attention_heads // (
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    )
    for group in {group.place: group for group in groups if group.kind not in DEPTH_KINDS}.values():
        count, name = widest[group.place], group.place.rpartition(":")[0]
        if group.kind == "heads":
            config.head_dim = group.width // per_group
            config.num_attention_heads = count * per_group
            if getattr(config, "num_key_value_heads", None):
                config.num_key_value_heads = count
        elif group.kind == "query_heads":
            config.head_dim = group.width
            config.num_attention_heads = count * config.num_key_value_heads
        elif family.mixture and group.kind == "experts":
            setattr(config, family.mixture.count, count)
        elif family.mixture and name.startswith(family.mixture.module):
            setattr(config, family.mixture.width, count)
        else:
            setattr(config, next(ffn.width for ffn in family.feed_forward if ffn.down == name), count)
    plain = config.to_dict()
    if target == config.model_type:
        return type(config).from_dict(plain)
    if plain.get("attention_bias") or plain.get("mlp_bias"):
        raise ValueError(f"{target} has no biases")
    from transformers import AutoConfig

    known = inspect.signature(type(AutoConfig.for_model(target)).__init__).parameters
    gone = ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp", "transformers_version")
    values = {key: value for key, value in plain.items() if key not in gone}
    return AutoConfig.for_model(target, **values, **({"sliding_window": None} if "sliding_window" in known else {}))


def _with_blocks(config: Any, blocks: Sequence[int]) -> Any:
    """The config of these blocks alone: their number, and every list that has an entry a layer."""
    before = config.num_hidden_layers
    if list(blocks) == list(range(before)):
        return config
    for name, value in config.to_dict().items():
        if name == "mlp_only_layers" and value:
            setattr(config, name, [new for new, old in enumerate(blocks) if old in value])
        elif "layer" in name and isinstance(value, list | tuple) and len(value) == before:
            setattr(config, name, [value[i] for i in blocks])
    config.num_hidden_layers = len(blocks)
    return config


def _expected_shapes(
    model: Any, family: Family, groups: Sequence[UnitGroup], widest: Mapping[str, int], blocks: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of the blocks that stay, by new number and name."""
    shapes = {
        f"{new}.{name}": list(parameter.shape)
        for new, old in enumerate(blocks)
        for name, parameter in model.get_submodule(f"{family.blocks}.{old}").named_parameters()
    }
    new_number = {old: new for new, old in enumerate(blocks)}
    for group in groups:
        if group.kind in DEPTH_KINDS or group.block not in new_number:
            continue
        for part in group.parts:
            if part.expert:  # all experts of a layer are one tensor, and alike
                continue
            rest = part.parameter.removeprefix(f"{family.blocks}.{group.block}.")
            axis = part.axis + (part.expert is not None)
            shapes[f"{new_number[group.block]}.{rest}"][axis] -= (group.count - widest[group.place]) * part.size
    return {name: tuple(shape) for name, shape in shapes.items()}


def _shapes(config: Any, family: Family, blocks: Sequence[str]) -> dict[str, tuple[int, ...]]:
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        built = AutoModelForCausalLM.from_config(config)
    return {
        f"{i}.{name}": tuple(parameter.shape)
        for i in blocks
        for name, parameter in built.get_submodule(f"{family.blocks}.{i}").named_parameters()
    }


def _hetero_config(model: Any, groups: Sequence[UnitGroup], kept: Kept, units: Mapping[str, int]) -> Any:
    """A config of the class in modeling_pruned.py: the family's own, and what differs from it."""
    family, base = family_of(model.config.model_type), model.config.model_type
    before = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    absent = absent_modules(groups, kept, family)
    after = cut_state(before, groups, kept, units, [path for path, _ in absent])
    heads, experts = _head_counts(model, family, groups, units)
    plain = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "auto_map")}
    plain["pruned"] = {
        "base": base,
        "shapes": {name: list(t.shape) for name, t in after.items() if t.shape != before[name].shape},
        "heads": heads,
        "experts": experts,
        "absent": [list(entry) for entry in absent],
    }
    modeling_pruned.register({"model_type": modeling_pruned.PREFIX + base})
    config, built = modeling_pruned.pruned_classes(base)
    plain["architectures"] = [built.__name__]
    plain["auto_map"] = {
        "AutoConfig": f"modeling_pruned.{config.__name__}",
        "AutoModelForCausalLM": f"modeling_pruned.{built.__name__}",
    }
    return config.from_dict(plain)


def _head_counts(
    model: Any, family: Family, groups: Sequence[UnitGroup], units: Mapping[str, int]
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """[query heads, KV heads] of attention modules, and experts of modules, where they change."""
    query = int(model.config.num_attention_heads)
    kv = int(getattr(model.config, "num_key_value_heads", None) or query)
    heads: dict[str, list[int]] = {}
    experts: dict[str, int] = {}
    for group in groups:
        path, count = f"{family.blocks}.{group.block}", units[group.key]
        if group.kind == "heads" and count != group.count:
            heads[f"{path}.{family.attention.module}"] = [count * (query // kv), count]
        elif group.kind == "query_heads" and count != group.count:
            heads[f"{path}.{family.attention.module}"] = [count * kv, kv]
        elif group.kind == "experts" and family.mixture:
            experts |= {f"{path}.{family.mixture.module}": count, f"{path}.{family.mixture.router}": count}
    return heads, experts


def shrunk(model: Any, groups: Sequence[UnitGroup], kept: Kept, plan: Plan) -> Any:
    """A new model of the plan's shapes, which computes what `model` computes without the units that go.

    Tensors that are not cut are shared with `model`, which stays as it is.
    """
    from transformers import AutoModelForCausalLM

    family = family_of(model.config.model_type)
    absent = [path for path, _ in absent_modules(groups, kept, family)] if plan.layout == "hetero" else []
    state = _renumbered(cut_state(model.state_dict(), groups, kept, plan.slots, absent), family, plan.blocks)
    with init_empty_weights(include_buffers=False):
        new: Any = AutoModelForCausalLM.from_config(plan.config, dtype=next(model.parameters()).dtype)
    new.load_state_dict(state, assign=True)
    new.tie_weights()
    new.generation_config = model.generation_config
    return new.to(next(model.parameters()).device).eval().requires_grad_(False)


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
