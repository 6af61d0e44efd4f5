"""Names and layouts on disk: what the files call a parameter, by transformers' own conversions, in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topiarist.checkpoints.reading import Checkpoint
from topiarist.core.errors import CheckpointError, first_line

Read = Callable[[str], Tensor]


@dataclass
class Group:
    """Tensors on disk that become parameters together: one for one, or through a conversion."""

    keys: list[tuple[str, str | None]]
    """(name on disk, pattern of the conversion that it matches)"""
    converter: Any = None
    targets: tuple[str, ...] = ()


class DiskNames:
    """Which tensors on disk make up which parameters and stored buffers of a model."""

    def __init__(self, model: Any, files: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        state, prefix = model.state_dict(), model.base_model_prefix
        self.model = model
        self.groups: dict[str, Group] = {}
        self.unclaimed: list[str] = []
        """Tensors on disk that no module uses: they are copied as they are."""
        for key in sorted(files, key=dot_natural_key):  # experts in their order
            name, pattern = (
                (key, None)
                if key in state and not transforms
                else rename_source_key(key, renamings, converters, prefix, state)
            )
            if name not in state and key in state:
                name, pattern = key, None
            if name in state:
                self.groups.setdefault(name, Group([], by_pattern.get(pattern or ""))).keys.append((key, pattern))
            else:
                self.unclaimed.append(key)
        self._first: dict[str, str] = {}
        for first, group in self.groups.items():
            group.targets = _targets(first, group.converter)
            self._first.update(dict.fromkeys(group.targets, first))
        used = [t for t in transforms if getattr(t, "was_used", lambda: True)()]
        self._conversions = used

    def __contains__(self, name: str) -> bool:
        return name in self._first

    def group(self, name: str) -> Group:
        """The group that a parameter comes from. Raises CheckpointError if the files have none."""
        try:
            return self.groups[self._first[name]]
        except KeyError:
            raise CheckpointError(f"tensor {name} is missing") from None

    def keys(self, names: Iterable[str]) -> set[str]:
        """The tensors on disk that the named parameters come from."""
        firsts = {self._first[name] for name in names if name in self._first}
        return {key for first in firsts for key, _ in self.groups[first].keys}

    def read(self, name: str, read: Read) -> dict[str, Tensor]:
        """A parameter, and those that the same tensors hold, by name."""
        first = self._first[name]
        group = self.groups[first]
        if group.converter is None:
            return {first: read(group.keys[0][0])}
        converter = deepcopy(group.converter)
        for key, pattern in group.keys:
            converter.add_tensor(first, key, pattern, lambda key=key: read(key))
        found = converter.convert(first, model=self.model, config=self.model.config)
        if isinstance(found, tuple):  # transformers 5.0 gives the errors too
            found = found[0]
        return {key: value[0] if isinstance(value, list) else value for key, value in found.items()}

    def write(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters, whole groups of them, as the tensors on disk that they came from: names and shapes, not yet dtypes."""
        from transformers.core_model_loading import revert_weight_conversion

        stored: dict[str, Tensor] = {}
        converted: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if name not in self._first:
                continue
            group = self.groups[self._first[name]]
            if group.converter is None:
                stored[group.keys[0][0]] = tensor
            else:
                converted[name] = tensor
        if converted:
            before = self.model.__dict__.get("_weight_conversions")
            self.model._weight_conversions = self._conversions
            try:
                back = revert_weight_conversion(self.model, converted)
            finally:
                self.model._weight_conversions = before
            if set(back) != self.keys(converted):
                odd = min(set(back) ^ self.keys(converted))
                raise CheckpointError(
                    f"transformers cannot write {odd} back as it was read: convert the checkpoint first"
                )
            stored.update(back)
        return stored

    def shapes(self, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
        """The shape that each parameter has by the files, found on tensors without memory.

        Raises CheckpointError if the files' tensors do not fit together, or could not be written back.
        """

        def empty(key: str) -> Tensor:
            return torch.empty(checkpoint.shape(key), device="meta")

        found: dict[str, tuple[int, ...]] = {}
        tried: set[int] = set()
        for first, group in self.groups.items():
            if group.converter is None:
                found[first] = checkpoint.shape(group.keys[0][0])
                continue
            try:
                state = self.read(first, empty)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise CheckpointError(
                    f"{group.keys[0][0]} and its like in {checkpoint.folder} make no {first}: {first_line(error)}"
                ) from error
            found.update({name: tuple(tensor.shape) for name, tensor in state.items()})
            if id(group.converter) not in tried:
                tried.add(id(group.converter))
                for key, tensor in self.write(state).items():
                    if tuple(tensor.shape) != checkpoint.shape(key):
                        raise CheckpointError(f"transformers cannot write {key} back as it was read")
        return found


def _targets(first: str, converter: Any) -> tuple[str, ...]:
    if converter is None:
        return (first,)
    patterns = converter.target_patterns
    return tuple(first.replace(patterns[0], pattern) for pattern in patterns)


def summary(names: Iterable[str]) -> list[str]:
    """Names with their numbers replaced by N, each once."""
    return sorted({re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in names})
