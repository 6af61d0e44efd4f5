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
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from topiarist.core import former
from topiarist.core.errors import TopiaristError, UnsupportedModel
from topiarist.models.derive import family_of, has_row
from topiarist.models.families import Family, FeedForward
from topiarist.models.mixtures import mixture_of

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


def default_kinds(model: nn.Module) -> tuple[str, ...]:
    """Heads and channels; query heads where there is one KV head (multi-query attention). Of a type without a row, those
    of them that its config can state fewer of.
    """
    from topiarist.structured import derived  # it is made of what is here

    if not has_row(model):
        return derived.default_kinds(model)
    attention = _heads(model)
    return ("heads" if attention.kv == 1 < attention.query else "kv_groups", "channels")


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Raises TopiaristError for unknown kinds and for those that hold each other."""
    if "query_heads" in kinds:
        raise TopiaristError(f"units 'query_heads' are called {former.UNITS['query_heads']!r} now: use that name")
    if not kinds or (unknown := sorted(set(kinds) - set(KINDS))):
        raise TopiaristError(
            f"unknown units {(list(kinds) and unknown[0]) or 'none'!r}; choose from {', '.join(KINDS)}"
        )
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


def units_of(model: Any, kinds: Sequence[str]) -> list[UnitGroup]:
    """The units of a model, block by block. Raises UnsupportedModel for kinds that it does not have.

    Works on a model without memory (meta tensors) too.
    """
    kinds = check_kinds(kinds)
    from topiarist.structured import derived  # it is made of what is here

    groups = seen_units(model, kinds) if has_row(model) else derived.units_of(model, kinds)
    if missing := [kind for kind in kinds if not any(group.kind == kind for group in groups)]:
        raise UnsupportedModel(f"{model.config.model_type} has no {missing[0]} to cut; choose other units")
    return groups


def seen_units(model: Any, kinds: Sequence[str]) -> list[UnitGroup]:
    """Units where the family's row says that they lie; experts where modules show them, without a row too."""
    family = family_of(model)
    groups: list[UnitGroup] = []
    if HIDDEN in kinds:
        from topiarist.structured.width import hidden_group  # which is made of what stands here

        groups.append(hidden_group(model))
    for index, block in enumerate(model.get_submodule(family.blocks)):
        finder = _Finder(model, family, index, block)
        for kind in kinds:
            groups += getattr(finder, kind)() if kind != HIDDEN else []
    return groups


@dataclass(frozen=True)
class Heads:
    """Heads of an attention layer: query heads, key-value heads, channels of each."""

    query: int
    kv: int
    dim: int

    @property
    def per_group(self) -> int:
        """Query heads that share a key-value head."""
        return self.query // self.kv


def _heads(model: Any) -> Heads:
    config, family = model.config, family_of(model)
    query = int(config.num_attention_heads)
    kv = int(getattr(config, "num_key_value_heads", None) or query)
    out = model.get_submodule(f"{family.blocks}.0.{family.attention.module}.{family.attention.out}")
    return Heads(query, kv, out.weight.shape[0 if is_transposed(out) else 1] // query)


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


class _Finder:
    """The units of one block, from the family's row and the shapes of its parameters."""

    def __init__(self, model: Any, family: Family, index: int, block: nn.Module) -> None:
        self.model, self.family, self.index, self.module = model, family, index, block
        self.path = f"{family.blocks}.{index}"
        self.parameters = dict(block.named_parameters())

    def _part(self, name: str, start: int, size: int, *, inputs: bool = False) -> list[Part]:
        """The rows (or input columns) of a matrix and, of rows, the same stretch of its bias."""
        axis = int(inputs != is_transposed(self.module.get_submodule(name)))
        parts = [Part(f"{self.path}.{name}.weight", axis, start, size)]
        if not inputs and f"{name}.bias" in self.parameters:
            parts.append(Part(f"{self.path}.{name}.bias", 0, start, size))
        return parts

    def _group(self, kind: str, acts_on: str, parts: Sequence[Part], **fields: Any) -> UnitGroup:
        full = f"{self.path}.{acts_on}".rstrip(".")
        key = f"{full}{fields.pop('suffix', '')}:{kind}"
        place = f"{acts_on}:{kind}" if kind in WIDTH_KINDS else key
        defaults = {"start": 0, "width": 0, "place": place, "tie": key, "consumer": full}
        return UnitGroup(
            key,
            kind,
            self.index,
            cost=parameters_of(self.parameters, self.path, parts),
            parts=tuple(parts),
            **(defaults | fields),
        )

    def _attention_rows(self, heads: Heads, kv: int | None) -> list[Part]:
        """Rows of q, k and v for every KV group, or of q alone for the query heads of group `kv`."""
        names = [f"{self.family.attention.module}.{name}" for name in self.family.attention.qkv]
        group, dim = heads.per_group * heads.dim, heads.dim
        if self.family.attention.interleaved:
            return self._part(names[0], 0, 3 * dim)
        starts = [0, 0, 0] if len(names) == 3 else [0, heads.query * dim, (heads.query + heads.kv) * dim]
        names = names if len(names) == 3 else names * 3
        if kv is not None:
            return self._part(names[0], starts[0] + kv * group, dim)
        rows: list[Part] = []
        for name, start, size in zip(names, starts, (group, dim, dim), strict=True):
            rows += self._part(name, start, size)
        return rows

    def _norm_parts(self, heads: Heads, kv: int | None) -> tuple[list[Part], bool]:
        """Norms of queries and keys that hold a number for every head, and whether cutting them is exact."""
        module = self.family.attention.module
        if any(name.startswith((f"{module}.q_layernorm.", f"{module}.k_layernorm.")) for name in self.parameters):
            raise UnsupportedModel(f"{self.path}: a norm for every single head cannot be cut; choose --units channels")
        parts, exact = [], True
        for name, count in (("q_norm", heads.query), ("k_norm", heads.kv)):
            weight = self.parameters.get(f"{module}.{name}.weight")
            if weight is None or weight.numel() == heads.dim or (kv is not None and name == "k_norm"):
                continue  # none, or one norm for all heads alike
            by_head = weight.ndim == 2
            per_unit = count // heads.kv if kv is None else 1
            size = per_unit * (1 if by_head else heads.dim)
            start = 0 if kv is None else kv * heads.per_group * (1 if by_head else heads.dim)
            parts.append(Part(f"{self.path}.{module}.{name}.weight", 0, start, size))
            exact &= by_head
        return parts, exact

    def kv_groups(self) -> list[UnitGroup]:
        heads = _heads(self.model)
        if heads.kv == 1:
            raise UnsupportedModel("one KV head for all queries (multi-query attention): choose --units heads")
        return [self._head_group("kv_groups", heads, None)]

    def heads(self) -> list[UnitGroup]:
        heads = _heads(self.model)
        if heads.per_group == 1:
            raise UnsupportedModel("every query head has its own KV head: choose --units kv_groups")
        return [self._head_group("heads", heads, kv) for kv in range(heads.kv)]

    def _head_group(self, kind: str, heads: Heads, kv: int | None) -> UnitGroup:
        out = f"{self.family.attention.module}.{self.family.attention.out}"
        norms, exact = self._norm_parts(heads, kv)
        width = heads.dim * (heads.per_group if kv is None else 1)
        start = 0 if kv is None else kv * heads.per_group * heads.dim
        parts = [*self._attention_rows(heads, kv), *norms, *self._part(out, start, width, inputs=True)]
        count = heads.kv if kv is None else heads.per_group
        more = {} if kv is None else {"suffix": f".{kv}", "tie": f"{self.path}.{out}:{kind}"}
        return self._group(kind, out, parts, count=count, start=start, width=width, exact=exact, **more)

    def channels(self) -> list[UnitGroup]:
        groups = [self._channel_group(ffn) for ffn in self._feed_forward()]
        mixture = mixture_of(self.module)
        if mixture is not None and f"{mixture.module}.down_proj" in self.parameters:
            down = f"{mixture.module}.down_proj"
            experts, _, width = self.parameters[down].shape
            for e in range(experts):
                up = f"{self.path}.{mixture.module}.gate_up_proj"
                parts = [Part(up, 0, 0, 1, e), Part(up, 0, width, 1, e), Part(f"{self.path}.{down}", 1, 0, 1, e)]
                fields: dict[str, Any] = {"suffix": f".{e}", "tie": f"{self.path}.{down}:channels"}
                fields["consumer"] = f"{self.path}.{down}.{e}"
                groups.append(self._group("channels", down, parts, count=width, width=1, **fields))
        return groups

    def _feed_forward(self) -> list[FeedForward]:
        return [ffn for ffn in self.family.feed_forward if f"{ffn.down}.weight" in self.parameters]

    def _channel_group(self, ffn: FeedForward) -> UnitGroup:
        down = self._part(ffn.down, 0, 1, inputs=True)
        width = self.parameters[f"{ffn.down}.weight"].shape[down[0].axis]
        parts: list[Part] = []
        for name in ffn.first:
            rows = self._part(name, 0, 1)
            halves = self.parameters[f"{name}.weight"].shape[rows[0].axis] // width
            for half in range(halves):
                parts += self._part(name, half * width, 1)
        return self._group("channels", ffn.down, [*parts, *down], count=width, width=1)

    def experts(self) -> list[UnitGroup]:
        mixture = mixture_of(self.module)
        if mixture is None:
            return []
        if mixture.why:
            raise UnsupportedModel(f"experts of {self.path} cannot be cut: {mixture.why}; choose other units")
        entries = [*((name, 0) for name in mixture.stacked), *mixture.routed]
        count, groups = mixture.count // mixture.groups, []
        for group in range(mixture.groups):
            parts = {name: Part(f"{self.path}.{name}", axis, group * count, 1) for name, axis in entries}
            more = (
                {} if mixture.groups == 1 else {"suffix": f".{group}", "tie": f"{self.path}.{mixture.router}:experts"}
            )
            groups.append(
                self._group(
                    "experts",
                    mixture.router,
                    [part for name, part in parts.items() if name in self.parameters],
                    buffers=tuple(part for name, part in parts.items() if name not in self.parameters),
                    count=count,
                    floor=mixture.floor,
                    start=group * count,
                    **more,
                )
            )
        return groups

    def _sublayer(self, kind: str, modules: Sequence[str]) -> list[UnitGroup]:
        names = [n for n in self.parameters if not modules[-1] or n.startswith(tuple(f"{m}." for m in modules))]
        parts = [Part(f"{self.path}.{n}", 0, 0, self.parameters[n].shape[0]) for n in names]
        return [self._group(kind, modules[-1], parts, count=1, floor=0)]

    def attention(self) -> list[UnitGroup]:
        return self._sublayer("attention", self.family.sublayer("attention"))

    def ffn(self) -> list[UnitGroup]:
        return self._sublayer("ffn", self.family.sublayer("ffn"))

    def block(self) -> list[UnitGroup]:
        return self._sublayer("block", ("",))


def output_parameters(model: Any, group: UnitGroup) -> list[str]:
    """Weights and biases of the last matrices of a sublayer (of both, for a block): zeros in them switch it off.

    Raises UnsupportedModel for a type without a row: which matrices those are is not known.
    """
    if not has_row(model):
        raise UnsupportedModel(
            f"zeros cannot stand for a whole {group.kind} of model type {model.config.model_type!r}: choose --layout uniform"
        )
    family, path = family_of(model), f"{family_of(model).blocks}.{group.block}"
    parameters = dict(model.get_submodule(path).named_parameters())
    attention = f"{family.attention.module}.{family.attention.out}"
    ffn = [layer.down for layer in family.feed_forward]
    modules = {"attention": [attention], "ffn": ffn, "block": [attention, *ffn]}[group.kind]
    names = [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
    mixture = mixture_of(model.get_submodule(path))
    if mixture is not None and group.kind != "attention":
        names += mixture.down
    return [f"{path}.{name}" for name in names if name in parameters]
