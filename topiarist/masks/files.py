"""The mask file itself: writing, reading, and putting masks on a folder or a loaded model.

It states for every tensor its pattern, shape, the axis that groups run along, how it is packed, and the sha256 of the
weight it belongs to; and for the whole file the row order, the base model's name and the tool's version.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from topiarist.__about__ import __version__
from topiarist.checkpoints.access import check_name, check_readable
from topiarist.checkpoints.atomic import save_tensors
from topiarist.checkpoints.reading import Checkpoint, locate, weight_digest
from topiarist.core.errors import CheckpointError, PatternError, first_line
from topiarist.core.patterns import Pattern, parse_pattern
from topiarist.masklearn.candidates import ORDER
from topiarist.masks.bitpack import pack, unpack
from topiarist.masks.entries import Entry, metadata_digest, read_entry

FORMAT = "topiarist_masks"


def save_masks(
    path: str | Path,
    masks: Mapping[str, Tensor],
    *,
    weights: Mapping[str, Tensor],
    pattern: str | Pattern | Mapping[str, str | Pattern],
    base_model: str,
    transposed: frozenset[str] | set[str] = frozenset(),
    info: Mapping[str, str] | None = None,
) -> None:
    """Write masks by parameter name, each with the dense weight it belongs to. Atomic.

    pattern: one for all, or by name. transposed: names of weights stored (in, out). info: more metadata, text only.
    Raises PatternError if a mask is not bool, not of its pattern or without weight, CheckpointError if the file cannot be
    written.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, mask in masks.items():
        if name not in weights or (isinstance(pattern, Mapping) and name not in pattern):
            raise PatternError(
                f"{name} has a mask and no {'pattern' if name in weights else 'weight'}: give both for each"
            )
        if mask.dtype != torch.bool:
            raise PatternError(f"{name}: its mask is {mask.dtype}, and True means kept: give a bool mask")
        kind = parse_pattern(pattern[name] if isinstance(pattern, Mapping) else pattern)
        weight = weights[name]
        if mask.shape != weight.shape:
            raise PatternError(f"{name}: mask of shape {tuple(mask.shape)} for a weight of {tuple(weight.shape)}")
        axis = -2 if name in transposed else -1
        try:
            packed, encoding = pack(mask.transpose(-1, axis), kind)
        except PatternError as error:
            raise PatternError(f"{name}: {error}") from None
        tensors[name] = packed
        dtype = str(weight.dtype).removeprefix("torch.")
        entries[name] = vars(
            Entry(str(kind), tuple(mask.shape), axis, encoding, dtype, weight_digest(weight), weight_digest(packed))
        )
    # One value, because safetensors writes several in no fixed order: the same masks must be the same bytes.
    metadata = {
        **(info or {}),
        "version": 1,
        "tool": f"topiarist {__version__}",
        "order": ORDER,
        "base_model": base_model,
        "masks": entries,
    }
    metadata["digest"] = metadata_digest(metadata)
    save_tensors(path, tensors, {FORMAT: json.dumps(metadata, sort_keys=True)})


class MaskFile(Mapping[str, Tensor]):
    """A mask file, read mask by mask. Raises CheckpointError for everything truncated, damaged or foreign."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_name(self.path)
        if not self.path.is_file():
            raise CheckpointError(f"mask file {path} does not exist")
        with self._opened() as reader:
            stated, names = (reader.metadata() or {}).get(FORMAT), set(reader.keys())
            slices = {name: reader.get_slice(name) for name in names}
            stored = {name: (found.get_dtype(), math.prod(found.get_shape())) for name, found in slices.items()}
        if stated is None:
            raise CheckpointError(f"{path} is not a topiarist mask file (a published .npz is read by read_npz)")
        try:
            self.metadata: dict[str, Any] = json.loads(stated)
            version, order, self.base_model = (str(self.metadata[key]) for key in ("version", "order", "base_model"))
            self.entries = {name: read_entry(stated) for name, stated in self.metadata["masks"].items()}
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} has damaged metadata ({first_line(error)[:200]}); copy it again") from error
        if (version, order) != ("1", ORDER):
            raise CheckpointError(
                f"{path} has version {version} and row order {order}; this topiarist reads version 1, {ORDER}: update it"
            )
        if self.metadata.get("digest", digest := metadata_digest(self.metadata)) != digest:
            raise CheckpointError(f"{path} has damaged metadata (its checksum differs); copy it again")
        if names != set(self.entries):
            raise CheckpointError(f"{path} describes other masks than it holds: it is damaged")
        for name, entry in self.entries.items():
            try:
                entry.check(*stored[name])
            except (CheckpointError, PatternError) as error:
                raise CheckpointError(f"{path} is damaged: {name}: {error}; copy it again") from None

    def _opened(self):
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            check_readable(self.path)
            raise CheckpointError(f"{self.path} is truncated or damaged ({error})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def pattern(self, name: str) -> Pattern:
        """The pattern that the file states for a mask."""
        return parse_pattern(self.entries[name].pattern)

    def __getitem__(self, name: str) -> Tensor:
        """The mask in the shape of the weight as it is stored, bool, True = kept."""
        entry = self.entries[name]
        with self._opened() as reader:
            packed = reader.get_tensor(name)
        if weight_digest(packed) != entry.packed_sha256:
            raise CheckpointError(f"{self.path}: the mask of {name} is damaged (checksum differs)")
        try:
            mask = unpack(packed, entry.packed_shape, self.pattern(name), entry.encoding)
        except (CheckpointError, PatternError) as error:
            raise CheckpointError(f"{self.path}: {name}: {error}") from None
        return mask.transpose(-1, entry.axis).contiguous()

    def check(self, name: str, weight: Shaped[Tensor, "..."]) -> None:
        """Raise CheckpointError unless `weight` is the dense weight this mask was made for (a wider dtype is fine)."""
        entry = self.entries[name]
        if tuple(weight.shape) != entry.shape:
            raise CheckpointError(
                f"{self.path} was made for another base model ({self.base_model}): {name} has shape "
                f"{tuple(weight.shape)}, the mask {entry.shape}"
            )
        if weight_digest(weight.to(getattr(torch, entry.dtype))) != entry.sha256:
            raise CheckpointError(
                f"{self.path} was made for another base model ({self.base_model}): the first tensor that differs is "
                f"{name}"
            )


def masked(weight: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The weight with +0.0 where the mask is False."""
    return weight.masked_fill(~mask.to(weight.device), 0.0)


@torch.no_grad()
def swap(
    model: nn.Module, masks: str | Path | MaskFile, *, base: str | Path | Mapping[str, Tensor] | None = None
) -> None:
    """Put another mask on a loaded model, in place.

    The dense weights must come from somewhere: the model itself the first time, or `base`: a folder or a state dict. They are
    then kept on the CPU, as `model.dense_weights`, for the next swap. Everything is checked before a weight changes.
    Raises CheckpointError for a damaged mask or another base, naming the first tensor that differs.
    """
    file = masks if isinstance(masks, MaskFile) else MaskFile(masks)
    parameters = dict(model.named_parameters())
    kept: dict[str, Tensor] = model.__dict__.setdefault("dense_weights", {})
    folder = Checkpoint(locate(base)) if isinstance(base, str | Path) else None
    dense: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    for name in file:
        if name not in parameters:
            raise CheckpointError(f"{file.path} has a mask for {name}, which the model lacks: it is for another model")
        if folder is not None and name in folder:
            source = folder.read(name)
        elif isinstance(base, Mapping) and name in base:
            source = base[name]
        elif base is not None and name not in kept:
            raise CheckpointError(
                f"the base has no {name}, as the model calls it: give the state dict of the loaded base, "
                "load_pruned(BASE).state_dict()"
            )
        else:
            source = kept.get(name, parameters[name])
        try:
            file.check(name, source)
        except CheckpointError as error:
            pruned = base is None and name not in kept and bool((source == 0).any())
            raise CheckpointError(
                f"{error}" + ("; the model is pruned already: pass base=" if pruned else "")
            ) from None
        dense[name], read[name] = source, file[name]
    for name, parameter in parameters.items():
        if name in dense:
            if name not in kept:
                kept[name] = dense[name].detach().to("cpu", copy=True)
            parameter.copy_(masked(dense[name], read[name]))
        elif name in kept:  # masked by the last file, not by this one
            parameter.copy_(kept[name])
