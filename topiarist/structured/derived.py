"""Units of a model type without a row: the axes of its parameters that follow a number of its config.

transformers itself is asked. The model is built without memory from its config with one number changed (fewer
channels, fewer heads); every parameter that comes out shorter belongs to the units, and the linear layer whose inputs
come out fewer consumes them. Where one matrix holds several things (gate above up; queries, keys and values), shapes
do not say how they lie in it: `proof.py` tries the ways on the weights themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from topiarist.core.errors import UnsupportedModel
from topiarist.models.building import REFUSALS, rebuilt
from topiarist.models.derive import family_of, structure_of
from topiarist.models.families import Family, matrices_of
from topiarist.structured import proof
from topiarist.structured.attempts import Attempt, channels, head_counts, heads, kv_groups, unstated
from topiarist.structured.edits import with_numbers
from topiarist.structured.row_units import seen_units
from topiarist.structured.units import HEAD_KINDS, Part, UnitGroup, parameters_of

KV_GROUPS, HEADS = HEAD_KINDS

WAYS = ("stacked", "by unit")
"""How a matrix that holds several things holds them: one after the other, or those of every unit together."""


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter of a block that changes with the config: its length before and after."""

    block: int
    name: str
    axis: int
    before: int
    after: int


@dataclass
class Proposal:
    """Units that a changed config shows, and that config's number of them: one that the type can hold."""

    groups: list[UnitGroup]
    after: int


def default_kinds(model: Any) -> tuple[str, ...]:
    """KV groups (heads, if there is one KV head) and channels, as far as a config of the type can state fewer of them.

    Raises UnsupportedModel, with the reasons, for a type that can state neither.
    """
    found: list[str] = []
    reasons: list[str] = []
    for kind in (KV_GROUPS, HEADS, "channels"):
        if kind == HEADS and (KV_GROUPS in found or head_counts(model)[1] != 1):
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


def proposals(model: Any, kind: str, way: str = WAYS[0]) -> list[Proposal]:
    """The units of one kind of a model without a row, field by field of its config.

    way: how matrices that hold several things hold them, one of `WAYS`. Works on a model without memory.
    Raises UnsupportedModel, with the reason, if no config of the type has fewer of them.
    """
    attempts = {"channels": channels, KV_GROUPS: kv_groups, HEADS: heads}[kind]
    found: dict[str, Proposal] = {}
    reasons: list[str] = []
    for attempt in attempts(model):
        if attempt.said in found:
            continue
        try:
            found[attempt.said] = _Reader(model, attempt, kind, way).read()
        except (UnsupportedModel, *REFUSALS) as error:
            reasons.append(f"{attempt.said}: {' '.join(str(error).split())}")
    if not found:
        why = "; ".join(dict.fromkeys(reasons)) or unstated(model, kind)
        raise UnsupportedModel(
            f"{kind} of model type {model.config.model_type!r} cannot be cut ({why}): choose other --units, "
            "or prune its matrices"
        )
    return list(found.values())


class _Reader:
    """What one changed config shows."""

    def __init__(self, model: Any, attempt: Attempt, kind: str, way: str) -> None:
        self.model, self.attempt, self.kind, self.way = model, attempt, kind, way
        self.family: Family = family_of(model)

    def read(self) -> Proposal:
        axes = self._axes()
        if not axes:
            raise UnsupportedModel("no matrix of the decoder blocks follows it")
        groups: list[UnitGroup] = []
        for block in sorted({axis.block for axis in axes}):
            groups += self._block(block, [axis for axis in axes if axis.block == block])
        return Proposal(groups, self.attempt.after)

    def _axes(self) -> list[Axis]:
        attempt = self.attempt
        config = with_numbers(self.model.config, attempt.stated, attempt.before, attempt.after)
        built = rebuilt(self.model, config)
        after = {name: tuple(p.shape) for name, p in built.named_parameters()}
        before = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        prefix = self.family.blocks + "."
        if other := sorted(name for name in after.keys() ^ before.keys() if name.startswith(prefix)):
            raise UnsupportedModel(f"{other[0]} comes or goes with it")
        found: list[Axis] = []
        for name, shape in before.items():
            if shape == after.get(name, shape):  # a tied head may stand in one of the two alone
                continue
            changed = [i for i, (a, b) in enumerate(zip(shape, after[name], strict=True)) if a != b]
            if not name.startswith(prefix) or len(changed) != 1:
                raise UnsupportedModel(f"{name} changes with it too")
            number, _, rest = name.removeprefix(prefix).partition(".")
            found.append(Axis(int(number), rest, changed[0], shape[changed[0]], after[name][changed[0]]))
        return found

    def _block(self, index: int, axes: Sequence[Axis]) -> list[UnitGroup]:
        """The groups of one block: one a consumer, each with the producers that stand nearest to it."""
        block = self.model.get_submodule(f"{self.family.blocks}.{index}")
        consumers = [axis for axis in axes if self._consumes(block, axis)]
        if not consumers:
            raise UnsupportedModel(f"no linear layer of block {index} has fewer inputs by it")
        owned: dict[str, list[Axis]] = {consumer.name: [] for consumer in consumers}
        for axis in axes:
            if axis not in consumers:
                owned[_nearest(axis.name, list(owned))].append(axis)
        prunable = {m.path for m in matrices_of(block, self.family)}
        groups = []
        for consumer in consumers:
            if consumer.name not in prunable:
                raise UnsupportedModel(f"{consumer.name} is no matrix that can be pruned")
            groups += self._groups(index, block, consumer, owned[consumer.name])
        return groups

    def _consumes(self, block: nn.Module, axis: Axis) -> bool:
        path, _, leaf = axis.name.rpartition(".")
        module = block.get_submodule(path)
        if axis.name in self.family.experts:
            return axis.axis == (1 if self.family.experts[axis.name] else 2)
        if leaf != "weight":
            return False
        if type(module).__name__ == "Conv1D":
            return axis.axis == 0
        return isinstance(module, nn.Linear) and axis.axis == 1

    def _groups(self, index: int, block: nn.Module, consumer: Axis, producers: Sequence[Axis]) -> list[UnitGroup]:
        """The groups that one consumer's columns are: one, one an expert, or of heads one a KV group."""
        attempt = self.attempt
        count = attempt.before if attempt.known else self._count(consumer)
        columns, rest = divmod(consumer.before - consumer.after, count - attempt.after)
        held_by = max(attempt.kv, 1)
        if rest or consumer.before != columns * count:
            raise UnsupportedModel(f"{consumer.name} has other inputs too, or not as many as the config says")
        fused = self.family.experts.get(consumer.name) is not None
        experts = block.get_parameter(consumer.name).shape[0] if fused else 1
        full = f"{self.family.blocks}.{index}"
        name = consumer.name if fused else consumer.name.rpartition(".")[0]
        parameters = dict(block.named_parameters())
        groups = []
        for part in range(max(experts, held_by)):
            expert = part if fused else None
            kv = part if held_by > 1 else 0
            parts: list[Part] = []
            exact = True
            for axis in producers:
                parts += self._parts(block, full, axis, columns // held_by, count, expert, kv)
                exact &= not _is_norm(block, axis.name)
            start = kv * (columns // held_by) * count if held_by > 1 else 0
            parts.append(_part(full, consumer, start, columns // held_by, expert))
            suffix = f".{part}" if fused or attempt.kv else ""
            groups.append(
                UnitGroup(
                    key=f"{full}.{name}{suffix}:{self.kind}",
                    kind=self.kind,
                    block=index,
                    count=count,
                    cost=parameters_of(parameters, full, parts),
                    consumer=f"{full}.{name}{suffix if fused else ''}",
                    start=start,
                    width=columns // held_by,
                    parts=tuple(parts),
                    place=f"{attempt.field} {count}:{self.kind}",
                    tie=f"{full}.{name}:{self.kind}",
                    exact=exact,
                    stated=attempt.stated,
                )
            )
        return groups

    def _count(self, consumer: Axis) -> int:
        """Units of a config that leaves their number to the code."""
        columns, rest = divmod(consumer.after, self.attempt.after)
        if rest or consumer.before % max(columns, 1) or not columns:
            raise UnsupportedModel(f"{consumer.name} does not follow it in proportion")
        return consumer.before // columns

    def _parts(
        self, block: nn.Module, full: str, axis: Axis, columns: int, count: int, expert: int | None, kv: int
    ) -> list[Part]:
        """What of a producer a unit owns. columns: of the consumer that a unit has."""
        attempt = self.attempt
        gone = (axis.before - axis.after) // (count - attempt.after)
        of_all = axis.before // count
        if attempt.kv:
            size = gone // attempt.kv
            return [_part(full, axis, kv * size * count, size, expert)]
        if gone * count != axis.before:
            raise UnsupportedModel(f"{axis.name} holds other things too")
        if self.way == "by unit" or of_all <= max(columns, 1) or _is_norm(block, axis.name):
            return [_part(full, axis, 0, of_all, expert)]
        sizes = self._stacked(of_all, columns)
        starts = [sum(sizes[:i]) * count for i in range(len(sizes))]
        return [_part(full, axis, start, size, expert) for start, size in zip(starts, sizes, strict=True)]

    def _stacked(self, of_all: int, columns: int) -> list[int]:
        """Rows a unit of each of the things that a matrix stacks: q, k and v, or several as wide as the consumer."""
        one = columns // self.attempt.per_group
        if self.kind == KV_GROUPS and of_all == columns + 2 * one:
            return [columns, one, one]
        return [columns] * (of_all // columns) if of_all % columns == 0 else [of_all]


def _part(full: str, axis: Axis, start: int, size: int, expert: int | None) -> Part:
    return Part(f"{full}.{axis.name}", axis.axis - (expert is not None), start, size, expert)


def _is_norm(block: nn.Module, name: str) -> bool:
    """Whether a parameter is a norm's that spans all units."""
    path = name.rpartition(".")[0]
    parameter = block.get_parameter(name)
    return "Norm" in type(block.get_submodule(path)).__name__ and parameter.ndim == 1


def _nearest(name: str, consumers: Sequence[str]) -> str:
    """The consumer in whose module, or nearest to it, a parameter is."""
    path = name.split(".")[:-1]

    def shared(consumer: str) -> int:
        other = consumer.split(".")[:-1]
        return next(
            (i for i, (a, b) in enumerate(zip(path, other, strict=False)) if a != b), min(len(path), len(other))
        )

    best = max(map(shared, consumers))
    nearest = [consumer for consumer in consumers if shared(consumer) == best]
    if len(nearest) > 1:
        raise UnsupportedModel(f"{name} may belong to {' or '.join(nearest)}")
    return nearest[0]
