"""Units: what can be cut out of a model whole, where its numbers lie, what it costs, and gates that switch it off.

    groups = units_of(model, ("kv_groups", "channels"))   one UnitGroup an attention or feed-forward layer
    with gates(model, groups) as masks:               {group.key: tensor of ones (count,)}
        masks[key] = ...                              seen by the next forward; may be 0/1, soft, or ask for a gradient
    kept = choose(groups, scores, keep, ...)          {group.key: bool (count,)}, see choose.py

A mask of shape (count,) holds for the whole batch; (batch, count) gives every sequence its own.

| kind | a unit is | mask multiplies |
|---|---|---|
| kv_groups | a KV group: one KV head with all its query heads | columns of the input of o_proj |
| heads | one query head; every KV group of a layer keeps as many | columns of the input of o_proj |
| channels | one FFN channel, of dense, shared and (all experts of a layer alike in number) expert layers | input of down_proj |
| experts | one routed expert; those without a mask share its tokens as the router ranks them | the router's probabilities |
| attention, ffn | a sublayer | what it adds to the hidden states |
| block | a whole block | what it adds to the hidden states |
| hidden | a channel of the hidden states, in all layers (width.py) | (no mask) |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from topiarist.core import former
from topiarist.core.errors import TopiaristError

HEAD_KINDS = ("kv_groups", "heads")
COLUMN_KINDS = (*HEAD_KINDS, "channels")
"""Units that are columns of the matrix that consumes them."""
WIDTH_KINDS = (*COLUMN_KINDS, "experts")
DEPTH_KINDS = ("attention", "ffn", "block")
LAYER_KINDS = (*WIDTH_KINDS, *DEPTH_KINDS)
"""Units of one layer, which `gates` can switch off."""
HIDDEN = "hidden"
KINDS = (*LAYER_KINDS, HIDDEN)
NESTED = ({"kv_groups", "heads"}, {"channels", "experts"}, {"attention", "block"}, {"ffn", "block"})
"""Kinds that no run can cut together, for one holds the other."""

Kept = dict[str, Bool[Tensor, " count"]]
"""Group key -> True where a unit stays."""


@dataclass(frozen=True)
class Part:
    """A stretch of a parameter: unit u owns indices [start + u size, start + (u + 1) size) along `axis`."""

    parameter: str
    axis: int
    start: int
    size: int
    expert: int | None = None
    """Of a fused 3-D parameter, the one expert that is meant; `axis` then counts without the expert's."""


@dataclass(frozen=True)
class Stated:
    """A number of the config that says how many units there are: `per_unit` times as many, and `constant`."""

    field: str
    per_unit: int
    constant: int = 0


@dataclass(frozen=True)
class UnitGroup:
    """Units of one kind in one layer, all of the same cost."""

    key: str
    """Name of its masks and scores: what the mask acts on, and the kind."""
    kind: str
    block: int
    count: int
    cost: int
    """Parameters that go with a unit, biases and norms included."""
    consumer: str
    """Whose input the mask multiplies (a matrix, `.e` for expert e of a fused parameter); a router; a module whose
    output it multiplies."""
    start: int
    width: int
    """Unit u is columns [start + u width, start + (u + 1) width) of the consumer's input; 0 for experts, which count from
    `start` among those of the router, and for sublayers."""
    parts: tuple[Part, ...]
    """All parameters that are cut. The consumer's own columns come last."""
    buffers: tuple[Part, ...] = field(default=(), kw_only=True)
    """Stored buffers that are cut with them, at no cost: what a router adds to the scores of experts."""
    place: str
    """The key without block, expert and KV group: a uniform layout keeps the same count in every group of one place.
    Every sublayer and block is a place of its own."""
    tie: str
    """Groups of one tie must keep the same count in any layout: the experts or the KV groups of a layer."""
    floor: int = 1
    """Units that must stay."""
    exact: bool = True
    """False where removing units changes the statistics of a norm that spans them all (OLMo 2's query and key norms)."""
    stated: tuple[Stated, ...] = ()
    """Of a type without a row: the numbers of the config that count them."""


def check_names(kinds: Sequence[str]) -> None:
    """Raises TopiaristError for unknown kinds, and for none."""
    if "query_heads" in kinds:
        raise TopiaristError(f"units 'query_heads' are called {former.UNITS['query_heads']!r} now: use that name")
    if not kinds or (unknown := sorted(set(kinds) - set(KINDS))):
        raise TopiaristError(
            f"unknown units {(list(kinds) and unknown[0]) or 'none'!r}; choose from {', '.join(KINDS)}"
        )


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Raises TopiaristError for unknown kinds and for those that hold each other."""
    check_names(kinds)
    held = next((sorted(pair) for pair in NESTED if pair <= set(kinds)), None)
    width = (*WIDTH_KINDS, HIDDEN)
    if held is None and set(kinds) & set(width) and set(kinds) & set(DEPTH_KINDS):
        held = [next(k for k in kinds if k in width), next(k for k in kinds if k in DEPTH_KINDS)]
    if held is not None:
        raise TopiaristError(
            f"{held[0]} and {held[1]} cannot be cut in one run, one holds the other: shrink twice, or name --target-params"
        )
    return tuple(dict.fromkeys(kinds))


def cut_order(kinds: Sequence[str]) -> list[tuple[str, ...]]:
    """The kinds that are cut together, in the order in which they go: the hidden states, units of layers, layers."""
    order = ((HIDDEN,), WIDTH_KINDS, DEPTH_KINDS)
    found = [tuple(kind for kind in kinds if kind in together) for together in order]
    return [together for together in found if together]


def parameters_of(parameters: Mapping[str, Tensor], path: str, parts: Sequence[Part]) -> int:
    """How many numbers one unit of these parts holds. parameters: of the block at `path`, by their names in it."""
    total = 0
    for part in parts:
        shape = list(parameters[part.parameter.removeprefix(path + ".")].shape)
        shape = shape[1:] if part.expert is not None else shape
        shape[part.axis] = part.size
        total += int(torch.Size(shape).numel())
    return total


def is_transposed(module: nn.Module) -> bool:
    """transformers' GPT-2 layer: weight is (in, out)."""
    return type(module).__name__ == "Conv1D"
