"""The cut itself: tensors without the units that go, or with zeros in their place.

slots  group key -> units that the new tensors have room for; more than are kept means zeros at the end (padding)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from topiarist.core.errors import UnsupportedModel
from topiarist.models.derive import family_of, has_row
from topiarist.models.mixtures import mixture_of
from topiarist.structured.units import DEPTH_KINDS, HIDDEN, Kept, Part, UnitGroup


def cut_state(
    state: Mapping[str, Tensor],
    groups: Sequence[UnitGroup],
    kept: Kept,
    slots: Mapping[str, int],
    absent: Iterable[str] = (),
) -> dict[str, Tensor]:
    """A model's state dict with every part cut to its slots, without what is in `absent` modules: contiguous, and not
    shared with the model where it was cut. Works on meta tensors.
    """
    gone = tuple(f"{path}." for path in absent)
    state = {name: t.detach() for name, t in state.items() if not name.startswith(gone)}
    stretches: dict[str, dict[int | None, list[tuple[Part, Tensor, int]]]] = {}
    for group in groups:
        if group.kind not in DEPTH_KINDS:
            for part in (*group.parts, *group.buffers):
                entry = (part, kept[group.key], slots[group.key])
                stretches.setdefault(part.parameter, {}).setdefault(part.expert, []).append(entry)
    for name, by_expert in stretches.items():
        if name not in state:
            continue
        if None in by_expert:
            state[name] = _cut(state[name], by_expert[None])
        else:
            state[name] = torch.stack([_cut(state[name][e], by_expert[e]) for e in sorted(by_expert)])  # pyright: ignore
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _cut(tensor: Tensor, stretches: Sequence[tuple[Part, Tensor, int]]) -> Tensor:
    axis = stretches[0][0].axis
    index = _indices(tensor.shape[axis], stretches).to(tensor.device)
    chosen = tensor.index_select(axis, index.clamp_min(0))
    empty = (index < 0).reshape([-1 if i == axis else 1 for i in range(tensor.ndim)])
    return chosen.masked_fill(empty, 0.0)


def _indices(length: int, stretches: Sequence[tuple[Part, Bool[Tensor, " count"], int]]) -> Int[Tensor, " new"]:
    """Where every index of the new axis comes from; -1 for padding. What no stretch covers stays."""
    pieces: list[Tensor] = []
    position = 0
    for part, mask, slots in sorted(stretches, key=lambda entry: entry[0].start):
        pieces.append(torch.arange(position, part.start))
        units = mask.cpu().nonzero().flatten()
        pieces.append((part.start + units[:, None] * part.size + torch.arange(part.size)).flatten())
        pieces.append(torch.full(((slots - len(units)) * part.size,), -1))
        position = part.start + len(mask) * part.size
    return torch.cat([*pieces, torch.arange(position, length)])


@torch.no_grad()
def mask_in_place(model: Any, groups: Sequence[UnitGroup], kept: Kept) -> None:
    """Write zeros (+0.0) into everything that belongs to units that go, so that the model computes without them.

    Where a norm spans all heads, only the consumer's columns are zeroed: the norm must see the others as they were.
    Raises UnsupportedModel, before any zero, for experts and for hidden channels of layer norms.
    """
    gone = [group for group in groups if not bool(kept[group.key].all())]
    cure = "open the shrunk model itself"
    if any(group.kind == "experts" for group in gone):
        raise UnsupportedModel(f"zeros do not keep a router from choosing an expert: {cure}")
    if any(group.kind == HIDDEN and not group.exact for group in gone):
        raise UnsupportedModel(f"zeros do not keep layer norms from counting a hidden channel in their mean: {cure}")
    for group in groups:
        mask = kept[group.key]
        if group.kind in DEPTH_KINDS:
            if not bool(mask.all()):
                for name in output_parameters(model, group):
                    model.get_parameter(name).zero_()
            continue
        gone = (~mask).cpu().nonzero().flatten()
        for part in group.parts if group.exact else group.parts[-1:]:
            parameter = model.get_parameter(part.parameter)
            tensor = parameter if part.expert is None else parameter[part.expert]
            rows = (part.start + gone[:, None] * part.size + torch.arange(part.size)).flatten()
            tensor.index_fill_(part.axis, rows.to(tensor.device), 0.0)


def output_parameters(model: Any, group: UnitGroup) -> list[str]:
    """Weights and biases of the last matrices of a sublayer (of both, for a block): zeros in them switch it off.

    Raises UnsupportedModel for a type without a row: which matrices those are is not known.
    """
    if not has_row(model):
        raise UnsupportedModel(
            f"zeros cannot stand for a whole {group.kind} of model type {model.config.model_type!r}: choose --layout uniform"
        )
    family = family_of(model)
    path = f"{family.blocks}.{group.block}"
    parameters = dict(model.get_submodule(path).named_parameters())
    attention = f"{family.attention.module}.{family.attention.out}"
    ffn = [layer.down for layer in family.feed_forward]
    modules = {"attention": [attention], "ffn": ffn, "block": [attention, *ffn]}[group.kind]
    names = [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
    mixture = mixture_of(model.get_submodule(path))
    if mixture is not None and group.kind != "attention":
        names += mixture.down
    return [f"{path}.{name}" for name in names if name in parameters]
