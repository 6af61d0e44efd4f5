"""Units where the family's row says that they lie, and experts where modules show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from topiarist.core.errors import UnsupportedModel
from topiarist.models.derive import family_of
from topiarist.models.families import Family, FeedForward
from topiarist.models.mixtures import mixture_of
from topiarist.structured.configs import head_dim
from topiarist.structured.units import HIDDEN, WIDTH_KINDS, Part, UnitGroup, is_transposed, parameters_of
from topiarist.structured.width import hidden_group


def seen_units(model: Any, kinds: Sequence[str]) -> list[UnitGroup]:
    """Units where the family's row says that they lie; experts where modules show them, without a row too."""
    family = family_of(model)
    groups: list[UnitGroup] = []
    if HIDDEN in kinds:
        groups.append(hidden_group(model))
    for index, block in enumerate(model.get_submodule(family.blocks)):
        finder = BlockUnits(model, family, index, block)
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


def heads_of(model: Any, family: Family) -> Heads:
    """The heads that the config counts."""
    query = int(model.config.num_attention_heads)
    kv = int(getattr(model.config, "num_key_value_heads", None) or query)
    return Heads(query, kv, head_dim(model, family))


class BlockUnits:
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
        """KV groups of the block, one group of units. Raises UnsupportedModel where all queries share one KV head."""
        heads = heads_of(self.model, self.family)
        if heads.kv == 1:
            raise UnsupportedModel("one KV head for all queries (multi-query attention): choose --units heads")
        return [self._head_group("kv_groups", heads, None)]

    def heads(self) -> list[UnitGroup]:
        """Query heads, a group of units for every KV head. Raises UnsupportedModel where each has its own KV head."""
        heads = heads_of(self.model, self.family)
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
        """Channels of every feed-forward network of the block, and of every routed expert."""
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
        """Routed experts, as many groups of units as the router chooses within; none where the block has no mixture."""
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
        """The attention sublayer, one unit."""
        return self._sublayer("attention", self.family.sublayer("attention"))

    def ffn(self) -> list[UnitGroup]:
        """The feed-forward sublayer, one unit."""
        return self._sublayer("ffn", self.family.sublayer("ffn"))

    def block(self) -> list[UnitGroup]:
        """The whole block, one unit."""
        return self._sublayer("block", ("",))
