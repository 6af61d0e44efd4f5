"""What a config with one number changed shows of the units: which axes follow it, and what of them a unit owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from topiarist.core.errors import UnsupportedModel
from topiarist.models.building import REFUSALS, rebuilt
from topiarist.models.derive import family_of
from topiarist.models.families import Family, matrices_of
from topiarist.structured.attempts import Attempt, channels, heads, kv_groups, unstated
from topiarist.structured.edits import with_numbers
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
