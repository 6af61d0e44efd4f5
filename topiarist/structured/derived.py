"""Units of a model type without a row: the axes of its parameters that follow a number of its config.

transformers itself is asked. The model is built without memory from its config with one number changed (fewer
channels, fewer heads); every parameter that comes out shorter belongs to the units, and the linear layer whose inputs
come out fewer consumes them (`proposals.py`). Where one matrix holds several things (gate above up; queries, keys and
values), shapes do not say how they lie in it: `proof.py` tries the ways on the weights themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from topiarist.core.errors import UnsupportedModel
from topiarist.models.derive import family_of, structure_of
from topiarist.structured import proof
from topiarist.structured.attempts import head_counts
from topiarist.structured.proposals import HEADS, KV_GROUPS, WAYS, proposals
from topiarist.structured.row_units import seen_units
from topiarist.structured.units import HEAD_KINDS, Part, UnitGroup


def default_kinds(model: Any) -> tuple[str, ...]:
    """KV groups (heads, if there is one KV head) and channels, as far as a config of the type can state fewer of them.

    Raises UnsupportedModel, with the reasons, for a type that can state neither.
    """
    found: list[str] = []
    reasons: list[str] = []
    for kind in (KV_GROUPS, HEADS, "channels"):
        if kind == HEADS and (KV_GROUPS in found or not _has_one_kv_head(model)):
            continue
        try:
            proposals(model, kind)
        except UnsupportedModel as error:
            reasons.append(str(error))
        else:
            found.append(kind)
    if not found:
        raise UnsupportedModel("; ".join(reasons))
    return tuple(found)


def _has_one_kv_head(model: Any) -> bool:
    try:
        return head_counts(model)[1] == 1
    except UnsupportedModel:  # no heads at all
        return False


def units_of(model: Any, kinds: Sequence[str]) -> list[UnitGroup]:
    """The units of a model whose type has no row, block by block.

    Of a model with weights, the cut is tried on them first (`proof.py`); without, how fused matrices hold the units is
    not known yet, and counts and sizes alone are good. Raises UnsupportedModel, with the reason.
    """
    groups: list[UnitGroup] = []
    for kind in kinds:
        if kind == "block":
            groups += _blocks(model)
        elif kind == "experts":
            groups += seen_units(model, (kind,))
        elif kind in (*HEAD_KINDS, "channels"):
            groups += _columns(model, kind)
        else:
            structure_of(model)  # raises: a row alone says where they lie
    return sorted(groups, key=lambda group: group.block)


def tried(model: Any, kinds: Sequence[str], layout: str) -> list[UnitGroup]:
    """`units_of` a model with weights, after a cut to the given layout was tried on them too."""
    groups = units_of(model, kinds)
    if layout == "hetero":
        proof.proven(model, [(groups, max(1, min(group.count for group in groups) // 2))], layout)
    return groups


def _columns(model: Any, kind: str) -> list[UnitGroup]:
    ways = [proposals(model, kind, way) for way in WAYS]
    if next(model.parameters()).is_meta:
        return [group for proposal in ways[0] for group in proposal.groups]
    found: list[UnitGroup] = []
    for same in zip(*ways, strict=True):
        found += proof.proven(model, [(p.groups, p.after) for p in same])
    return found


def _blocks(model: Any) -> list[UnitGroup]:
    """Blocks that the type's config can be without; one of every kind is tried."""
    family = family_of(model)
    blocks = list(model.get_submodule(family.blocks))
    groups = []
    for index, block in enumerate(blocks):
        path = f"{family.blocks}.{index}"
        parts = [Part(f"{path}.{name}", 0, 0, p.shape[0]) for name, p in block.named_parameters() if p.ndim]
        key, cost = f"{path}:block", sum(p.numel() for p in block.parameters())
        groups.append(UnitGroup(key, "block", index, 1, cost, path, 0, 0, tuple(parts), key, key, floor=0))
    looks = [(type(block), tuple((n, p.shape) for n, p in block.named_parameters())) for block in blocks]
    refused: dict[Any, str] = {}
    for look in dict.fromkeys(looks):
        index = len(looks) - 1 - looks[::-1].index(look)
        try:
            proof.without_block(model, groups, index)
        except UnsupportedModel as error:
            refused[look] = str(error)
    if len(refused) == len(set(looks)):
        raise UnsupportedModel(next(iter(refused.values())))
    return [group for group, look in zip(groups, looks, strict=True) if look not in refused]
