"""Safetensors files written tensor by tensor, so that a file of any size needs the memory of one buffer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from jaxtyping import Shaped
from torch import Tensor

from topiarist.checkpoints.atomic import replacing
from topiarist.checkpoints.reading import StoredTensor

SHARD_BYTES = 5 * 10**9
"""Weights are cut into files of this size, as the hub's own tools do."""
Chunks = Callable[[str], Iterable[bytes | memoryview]]
"""The bytes of a tensor by its name, in pieces."""


def split(tensors: Mapping[str, StoredTensor]) -> dict[str, list[str]]:
    """Return {file name: tensor names}: `model.safetensors` alone, or numbered files of at most SHARD_BYTES."""
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    return plan.filename_to_tensors


def write_tensors(path: Path, tensors: Mapping[str, StoredTensor], chunks: Chunks, *, cure: str = "") -> str:
    """Write a safetensors file atomically and return its sha256.

    The format: 8 bytes of length, a JSON header, the data. Tensors stand in the order of the library: wide elements
    first, so that every one of them is aligned.
    Raises CheckpointError if the file cannot be written, ValueError if `chunks` gives more or fewer bytes than stated.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with replacing(path, cure=cure) as temporary, temporary.open("wb") as out:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            out.write(piece)
        for name in order:
            before = out.tell()
            for piece in chunks(name):
                digest.update(piece)
                out.write(piece)
            if out.tell() - before != tensors[name].nbytes:
                raise ValueError(f"{name} has {out.tell() - before} bytes instead of {tensors[name].nbytes}")
    return digest.hexdigest()


def tensor_bytes(tensor: Shaped[Tensor, "..."]) -> memoryview:
    """The bytes of a tensor of any shape and dtype, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
