"""Blocks as compressed-tensors stores them, and the config that says so."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from topiarist.models.folder import FolderModel
from topiarist.quantization import Grid, QuantizedWeight, compressed_tensors, round_to_nearest

HEAD_GRID = Grid(bits=8, group=None)


def packed_block(source: FolderModel, index: int, weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """The loaded block as the files store it, its quantised matrices packed.

    weights: by the matrices' names in the block. Integers and scales take the same way to the files' names and shapes as
    weights do, so that experts which the model holds in one tensor come out under the names that the checkpoint gives them.
    """
    integers, scales = dict[str, Tensor](), dict[str, Tensor]()
    grid = next(iter(weights.values())).grid if weights else Grid()
    for matrix in source.matrices(index):
        weight = weights.get(matrix.name)
        if weight is None:
            continue
        path = f"{source.block_names[index]}.{matrix.path}"
        for name in source.names.group(path).targets:
            for tensors in (integers, scales):
                tensors.setdefault(name, torch.zeros_like(source.model.get_parameter(name)))
        whole = weight.scale.repeat_interleave(weight.q.shape[1] // weight.scale.shape[1], 1)
        for tensors, values in ((integers, weight.q), (scales, whole)):
            place = tensors[path] if matrix.expert is None else tensors[path][matrix.expert]
            (place.t() if matrix.transposed else place).copy_(values)
    stored, q, scale = source.block_on_disk(index), source.stored(integers), source.stored(scales)
    for name in q:
        if (packed := _gathered(q[name], scale[name], grid, name)) is not None:
            del stored[name]
            stored |= _named(name, packed)
    return dict(sorted(stored.items()))


def _gathered(q: Tensor, scale: Tensor, grid: Grid, name: str) -> QuantizedWeight | None:
    """A matrix of the files; None if it is none, or was not quantised, or not along the rows that it has there."""
    if q.ndim != 2 or not name.endswith(".weight") or q.shape[1] % (grid.group or 1):
        return None
    groups = scale.unflatten(1, (-1, grid.group or q.shape[1]))
    first = groups[..., 0]
    if not bool((groups == first[..., None]).all()) or not bool((first > 0).all()):
        return None
    return QuantizedWeight(q.to(torch.int8), first.contiguous(), grid)


def packed_bytes(shape: tuple[int, int], grid: Grid, dtype: torch.dtype) -> int:
    """Bytes of a packed matrix (out, in). dtype: of its scales."""
    rows, columns = shape
    return 4 * rows * -(-columns * grid.bits // 32) + dtype.itemsize * rows * (columns // grid.width(columns)) + 16


def _named(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    stem = name.removesuffix("weight")
    return {stem + end: tensor.cpu() for end, tensor in compressed_tensors.to_tensors(weight).items()}


def packed_head(source: FolderModel) -> dict[str, Tensor]:
    """The output head in 8 bits, a scale a row; a copy of its own where it is tied to the embeddings."""
    name = head_name(source) + ".weight"
    return _named(name, round_to_nearest(source.checkpoint.read(_head_on_disk(source)), HEAD_GRID))


def head_name(source: FolderModel) -> str:
    """The module name of the output head."""
    return _name_of(source, source.model.get_output_embeddings())


def _head_on_disk(source: FolderModel) -> str:
    """The tensor of the files that the head is, its own or the embeddings'."""
    modules = source.model.get_output_embeddings(), source.model.get_input_embeddings()
    names = [f"{_name_of(source, module)}.weight" for module in modules]
    return next(iter(source.names.keys([next(name for name in names if name in source.names)])))


def _name_of(source: FolderModel, module: nn.Module) -> str:
    return next(name for name, found in source.model.named_modules() if found is module)


def quantized_config(source: FolderModel, grid: Grid, written: Container[str], *, head: bool = False) -> dict[str, Any]:
    """The config of the result. written: names of its tensors. head: whether the output head is packed too."""
    stems = {name.removesuffix(".weight") for name in source.checkpoint.files if name not in written}
    rest = [name for name in source.checkpoint.files if name in written]
    groups: list[tuple[Sequence[str], Grid]] = [(["Linear"], grid)]
    linears = {name for name, module in source.model.named_modules() if isinstance(module, nn.Linear)}
    others = {name.removesuffix(".weight") for name in rest if name.endswith(".weight")}
    ignored = (linears | {name for name in others if len(source.checkpoint.shape(name + ".weight")) == 2}) - stems
    config = dict(source.checkpoint.config)
    if head:
        groups.insert(0, ([head_name(source)], HEAD_GRID))  # the first group that names a module is said to be its
        ignored -= {head_name(source)}
        config["tie_word_embeddings"] = False
    config["quantization_config"] = compressed_tensors.quantization_config(groups, sorted(ignored))
    dtype = config.get("dtype", config.get("torch_dtype"))
    return config if dtype else config | {"dtype": str(torch.get_default_dtype()).removeprefix("torch.")}
