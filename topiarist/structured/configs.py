"""Configs of cut models: stock ones, for layers that are all alike, and one for layers that differ.

Whether a stock config can hold a shape is asked of transformers itself: a model without memory is built from it, and
its shapes are compared with those of the cut. Families thus need no table of what they accept.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from topiarist.core.errors import UnsupportedModel
from topiarist.models import modeling_pruned
from topiarist.models.building import REFUSALS, rebuilt
from topiarist.models.derive import family_of
from topiarist.models.families import Family
from topiarist.models.mixtures import Mixture, count_fields, mixture_of, width_field
from topiarist.structured.block_configs import block_configs
from topiarist.structured.cut import cut_state
from topiarist.structured.edits import state_numbers, with_blocks
from topiarist.structured.units import DEPTH_KINDS, HEAD_KINDS, Kept, UnitGroup, is_transposed


def stock_config(
    model: Any,
    groups: Sequence[UnitGroup],
    widest: Mapping[str, int],
    blocks: Sequence[int],
    biased: Collection[str] = (),
) -> tuple[Any, list[str]]:
    """The stock config of the given widths; the family's own, or that of the type it may be relabelled to."""
    family = family_of(model)
    expected = _expected_shapes(model, family, groups, widest, blocks)
    for consumer in biased:
        width = model.get_submodule(consumer).weight.shape[int(is_transposed(model.get_submodule(consumer)))]
        expected[f"{consumer.removeprefix(family.blocks + '.')}.bias"] = (width,)
    reasons = []
    for target in filter(None, (model.config.model_type, family.relabel)):
        try:
            config = _edited(model, family, groups, widest, blocks, target, biased)
            built = rebuilt(model, config)
            found = _shapes(built, family, len(blocks))
            names = {name for name in found if not (biased and name.endswith(".bias"))} | set(expected)
            if wrong := sorted(name for name in names if found.get(name) != expected.get(name)):
                raise ValueError(f"{wrong[0]} would be {found.get(wrong[0])}, not {expected.get(wrong[0])}")
            if (count := len(built.get_submodule(family.blocks))) != len(blocks):  # another number states it
                raise ValueError(f"it would have {count} of them")
            every = range(len(model.get_submodule(family.blocks)))
            if target == model.config.model_type and len(blocks) < len(every):
                # Of the new widths too: what they change in a block is no other kind of block.
                whole = rebuilt(model, _edited(model, family, groups, widest, every, target, biased))
                _check_alike(whole, built, family, blocks)
        except REFUSALS as error:
            reasons.append(f"{target}: {' '.join(str(error).split())}")
            continue
        if target == model.config.model_type:
            return config, []
        return config, [
            f"saved as {target}, which computes the same: a {model.config.model_type} config refuses "
            f"{config.num_attention_heads} heads of {config.head_dim} at width {config.hidden_size}"
        ]
    what = ", ".join(f"{count} {place.rsplit(':', 1)[1]}" for place, count in widest.items())
    hetero = ", or --layout hetero" if what else ""  # which states widths, and no number of blocks
    raise UnsupportedModel(
        f"no {model.config.model_type} config can hold {what or f'{len(blocks)} blocks'} ({'; '.join(reasons)}): choose "
        f"other --units{hetero}"
    )


def _edited(
    model: Any,
    family: Family,
    groups: Sequence[UnitGroup],
    widest: Mapping[str, int],
    blocks: Sequence[int],
    target: str,
    biased: Collection[str],
) -> Any:
    """The config with new numbers, through its own constructor and its checks."""
    config = with_blocks(model.config, blocks, len(model.get_submodule(family.blocks)))
    for flag, module in (("attention_bias", family.attention.module), ("mlp_bias", "mlp")):
        if hasattr(config, flag) and any(f".{module}." in consumer for consumer in biased):
            setattr(config, flag, True)
    for group in _places(groups):
        if group.stated:
            state_numbers(config, group.stated, group.count, widest[group.place])
            continue
        count, name = widest[group.place], group.place.rpartition(":")[0]
        mixture = _mixture(model, family, group)
        if group.kind == "kv_groups":
            query = config.num_attention_heads
            per_group = query // (getattr(config, "num_key_value_heads", None) or query)
            config.head_dim = group.width // per_group
            config.num_attention_heads = count * per_group
            if getattr(config, "num_key_value_heads", None):
                config.num_key_value_heads = count
        elif group.kind == "heads":
            config.head_dim = group.width
            config.num_attention_heads = count * config.num_key_value_heads
        elif mixture is not None and group.kind == "experts":
            text = config.get_text_config(decoder=True)
            for key in count_fields(text, mixture.count):
                setattr(text, key, count * mixture.groups)
        elif mixture is not None and name.startswith(mixture.module):
            setattr(config, width_field(model.config, group.count) or "moe_intermediate_size", count)
        else:
            setattr(config, next(ffn.width for ffn in family.feed_forward if ffn.down == name), count)
    return with_type(config, target)


def head_dim(model: Any, family: Family) -> int:
    """Channels of one attention head, from the shape of the matrix that reads all heads."""
    out = model.get_submodule(f"{family.blocks}.0.{family.attention.module}.{family.attention.out}")
    return out.weight.shape[0 if is_transposed(out) else 1] // int(model.config.num_attention_heads)


def with_type(config: Any, target: str) -> Any:
    """The config through its own constructor and its checks, or through those of another type that computes the same."""
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


def _mixture(model: Any, family: Family, group: UnitGroup) -> Mixture | None:
    return mixture_of(model.get_submodule(f"{family.blocks}.{group.block}"))


def _places(groups: Sequence[UnitGroup]) -> list[UnitGroup]:
    """One group of every place."""
    return list({group.place: group for group in groups if group.kind not in DEPTH_KINDS}.values())


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


def _shapes(built: nn.Module, family: Family, blocks: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{i}.{name}": tuple(parameter.shape)
        for i in range(blocks)
        for name, parameter in built.get_submodule(f"{family.blocks}.{i}").named_parameters()
    }


def _check_alike(whole: Any, built: nn.Module, family: Family, blocks: Sequence[int]) -> None:
    """Raise ValueError if a block that stays would be built otherwise: with another window, another kind of attention."""
    for new, old in enumerate(blocks):
        after = dict(built.get_submodule(f"{family.blocks}.{new}").named_modules())
        for name, module in whole.get_submodule(f"{family.blocks}.{old}").named_modules():
            before, other = _settings(module), _settings(after[name])
            if wrong := [key for key, value in before.items() if other.get(key, value) != value]:
                raise ValueError(f"{wrong[0]} of block {old} would be {other[wrong[0]]}, not {before[wrong[0]]}")


_OWN_NUMBER = re.compile(r"layer_?(idx|id|number|index)|_idx|^training$")


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module keeps as plain values, but for its own number and its mode."""
    values = vars(module).items()
    return {k: v for k, v in values if isinstance(v, bool | int | float | str) and not _OWN_NUMBER.search(k)}


def hetero_config(
    model: Any, groups: Sequence[UnitGroup], kept: Kept, units: Mapping[str, int], biased: Collection[str]
) -> Any:
    """A config of the class in modeling_pruned.py: the family's own, and what differs from it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    family, base = family_of(model), model.config.model_type
    before = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    absent = absent_modules(groups, kept, family)
    after = cut_state(before, groups, kept, units, [path for path, _ in absent])
    heads, experts = _head_counts(model, family, groups, units)
    shapes = {name: list(t.shape) for name, t in after.items() if t.shape != before[name].shape}
    for name in biased:
        consumer = model.get_submodule(name)
        if consumer.bias is None:
            shapes[f"{name}.bias"] = [consumer.weight.shape[int(is_transposed(consumer))]]
    plain = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "auto_map")}
    plain["pruned"] = {
        "base": base,
        "shapes": shapes,
        "heads": heads,
        "experts": experts,
        "absent": [list(entry) for entry in absent],
    }
    if any(group.stated and group.kind in HEAD_KINDS for group in groups):
        raise UnsupportedModel(
            f"layers of {base} with heads of their own number need a row of topiarist.models.FAMILIES: choose --layout uniform"
        )
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"{base} is no causal language model alone: choose --layout uniform")
    modeling_pruned.register({"model_type": modeling_pruned.PREFIX + base})
    config, built = modeling_pruned.pruned_classes(base)
    plain["architectures"] = [built.__name__]
    plain["auto_map"] = {
        "AutoConfig": f"modeling_pruned.{config.__name__}",
        "AutoModelForCausalLM": f"modeling_pruned.{built.__name__}",
    }
    if blocks := block_configs(model.config, groups, units, biased):
        plain["block_configs"] = blocks
    return config.from_dict(plain)


def _head_counts(
    model: Any, family: Family, groups: Sequence[UnitGroup], units: Mapping[str, int]
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """[query heads, KV heads] of attention modules, and experts of modules, where they change."""
    query = int(getattr(model.config, "num_attention_heads", 1))
    kv = int(getattr(model.config, "num_key_value_heads", None) or query)
    heads: dict[str, list[int]] = {}
    experts: dict[str, int] = {}
    for group in groups:
        path, count = f"{family.blocks}.{group.block}", units[group.key]
        if group.kind == "kv_groups" and count != group.count:
            heads[f"{path}.{family.attention.module}"] = [count * (query // kv), count]
        elif group.kind == "heads" and count != group.count:
            heads[f"{path}.{family.attention.module}"] = [count * kv, kv]
        elif group.kind == "experts" and (mixture := _mixture(model, family, group)) is not None:
            for name in (mixture.module, mixture.router):
                experts[f"{path}.{name}"] = mixture.groups * count
    return heads, experts


def absent_modules(groups: Sequence[UnitGroup], kept: Kept, family: Family) -> list[tuple[str, str]]:
    """(module, "attention", "ffn" or "inside") of every sublayer that goes."""
    found = []
    for group in groups:
        if group.kind in ("attention", "ffn") and not bool(kept[group.key].all()):
            path = f"{family.blocks}.{group.block}"
            modules = family.sublayer(group.kind)
            found += [(f"{path}.{name}", "inside") for name in modules[:-1]] + [(f"{path}.{modules[-1]}", group.kind)]
    return found
