"""The units of a model, by whichever way shows them: its family's row, or the config of a type without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from topiarist.core.errors import UnsupportedModel
from topiarist.models.derive import family_of, has_row
from topiarist.structured import derived
from topiarist.structured.row_units import heads_of, seen_units
from topiarist.structured.units import UnitGroup, check_kinds


def default_kinds(model: nn.Module) -> tuple[str, ...]:
    """Heads and channels; query heads where there is one KV head (multi-query attention). Of a type without a row, those
    of them that its config can state fewer of.
    """
    if not has_row(model):
        return derived.default_kinds(model)
    attention = heads_of(model, family_of(model))
    return ("heads" if attention.kv == 1 < attention.query else "kv_groups", "channels")


def units_of(model: Any, kinds: Sequence[str]) -> list[UnitGroup]:
    """The units of a model, block by block. Raises UnsupportedModel for kinds that it does not have.

    Works on a model without memory (meta tensors) too.
    """
    kinds = check_kinds(kinds)
    groups = seen_units(model, kinds) if has_row(model) else derived.units_of(model, kinds)
    if missing := [kind for kind in kinds if not any(group.kind == kind for group in groups)]:
        raise UnsupportedModel(f"{model.config.model_type} has no {missing[0]} to cut; choose other units")
    return groups
