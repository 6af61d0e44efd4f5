"""Quantised checkpoints read as if they were not: every weight is dequantised when it is read, one at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topiarist.checkpoints.reading import Checkpoint, StoredTensor
from topiarist.core.errors import CheckpointError, UnsupportedModel
from topiarist.quantization import compressed_tensors, readers
from topiarist.quantization.compressed_tensors import PACKED, SCALE, SHAPE
from topiarist.quantization.grid import QuantizedWeight

QUANTIZATION = "quantization_config"
FLOAT8_BLOCK = (128, 128)
_FORMAT_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Stored:
    """How one weight lies in the files."""

    parts: Mapping[str, str]
    """What a tensor is -> its name in the files."""
    shape: Callable[[Checkpoint], tuple[int, ...]]
    read: Callable[[Mapping[str, Tensor]], Tensor]


_Finder = Callable[[Checkpoint, Mapping[str, Any]], Iterator[tuple[str, Stored]]]


class DequantisedCheckpoint(Checkpoint):
    """A folder of quantised weights that answers for `P.weight` as an ordinary one does; its config says nothing of the format.

    Reads compressed-tensors (packed integers of 2, 4 and 8 bits, int8, float8), fp8 with block scales, MXFP4 and GPTQ.
    Raises UnsupportedModel for other methods, CheckpointError or QuantizationError for tensors that do not belong together.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        about: dict[str, Any] = self.config.get(QUANTIZATION, {})
        method = str(about.get("quant_method"))
        if method not in _FINDERS:
            raise UnsupportedModel(
                f"{folder} is quantised by {method!r}, which is not read; {', '.join(_FINDERS)} are: take the original weights"
            )
        self._cover(Checkpoint(folder), _FINDERS[method], about)
        if not self._stored:
            raise CheckpointError(
                f"config.json says that {folder} is quantised by {method!r}, but no tensor is stored so: take the original"
            )

    @classmethod
    def of_packed(cls, shard: Checkpoint, dtype: torch.dtype) -> DequantisedCheckpoint:
        """A single file in compressed-tensors' packed format. dtype: of the model that it is a part of."""
        made = cls.__new__(cls)
        made.folder, made._headers = shard.folder, {}
        made.files, made.config = dict(shard.files), {"dtype": str(dtype).removeprefix("torch.")}
        made._cover(shard, _compressed, {})
        return made

    def _cover(self, files: Checkpoint, find: _Finder, about: Mapping[str, Any]) -> None:
        self._files = files
        self.config = {key: copy.deepcopy(value) for key, value in self.config.items() if key != QUANTIZATION}
        self._stored: dict[str, Stored] = dict(find(files, about))
        taken = {name for stored in self._stored.values() for name in stored.parts.values()}
        self.files = {name: path for name, path in self.files.items() if name not in taken}
        self.files |= {name: files.files[next(iter(stored.parts.values()))] for name, stored in self._stored.items()}

    def read(self, name: str, *, mapped: bool = False) -> Tensor:
        """One tensor; a quantised one is dequantised to the model's dtype, in memory of its own even if `mapped`."""
        if name not in self._stored:
            return self._files.read(name, mapped=mapped)
        stored = self._stored[name]
        dense = stored.read({part: self._files.read(where) for part, where in stored.parts.items()})
        return dense.to(self.dtype())

    @property
    def as_stored(self) -> Checkpoint:
        """The folder with its tensors and its config as they are."""
        return self._files

    def grids(self) -> dict[str, bool]:
        """The weights that are quantised, and whether they are stored as symmetric packed integers."""
        return {name: _is_symmetric(stored) for name, stored in self._stored.items()}

    def quantized(self, name: str) -> QuantizedWeight | None:
        """The weight on its grid where it is stored as symmetric packed integers; None otherwise."""
        stored = self._stored.get(name)
        if stored is None or not _is_symmetric(stored):
            return None
        tensors = {part: self._files.read(where) for part, where in stored.parts.items()}
        return compressed_tensors.from_tensors(tensors, _bits(tensors[PACKED].shape[1], int(tensors[SHAPE][1])))

    def close(self) -> None:
        """Let go of the file that was read last."""
        self._files.close()

    def stored(self, name: str) -> StoredTensor:
        """What an ordinary file would say of the tensor."""
        if name not in self._stored:
            return self._files.stored(name)
        shape, dtype = self._stored[name].shape(self._files), self.dtype()
        return StoredTensor(_FORMAT_NAMES[dtype], shape, math.prod(shape) * dtype.itemsize)

    def chunks(self, name: str, size: int = 1 << 24) -> Iterator[bytes]:
        """The bytes of a tensor in pieces of at most `size`; of a quantised one, those of its dequantised values."""
        if name not in self._stored:
            yield from self._files.chunks(name, size)
            return
        whole = memoryview(self.read(name).contiguous().view(-1).view(torch.uint8).numpy().data)
        for place in range(0, len(whole), size):
            yield bytes(whole[place : place + size])

    def weight_bytes(self) -> int:
        """Bytes of all tensors once dequantised, which is more than the files hold."""
        return sum(self.nbytes(name) for name in self.files)

    def digest(self) -> str:
        """sha256 over the quantised folder's own config and weight files."""
        return self._files.digest()

    def dtype(self) -> torch.dtype:
        """The dtype that weights are dequantised to: what the config states, else bfloat16."""
        stated = self.config.get("dtype", self.config.get("torch_dtype"))
        found = getattr(torch, str(stated), None)
        return found if isinstance(found, torch.dtype) else torch.bfloat16


def readable(folder: str | Path, *, strict: bool = True) -> Checkpoint:
    """The checkpoint in a folder, dequantised if it is quantised.

    strict: raise UnsupportedModel or CheckpointError if it is quantised in a way that is not read; otherwise give it as it is.
    """
    checkpoint = Checkpoint(folder)
    if QUANTIZATION not in checkpoint.config:
        return checkpoint
    try:
        return DequantisedCheckpoint(folder)
    except (UnsupportedModel, CheckpointError):
        if strict:
            raise
        return checkpoint


def _is_symmetric(stored: Stored) -> bool:
    return set(stored.parts) == {PACKED, SCALE, SHAPE}


def _bits(words: int, columns: int) -> int:
    return words * 32 // columns if columns else 0


def _shape_of(name: str) -> Callable[[Checkpoint], tuple[int, ...]]:
    return lambda files: files.shape(name)


def _partners(files: Checkpoint, stem: str, ends: Sequence[str], optional: Sequence[str] = ()) -> dict[str, str]:
    """Part -> name in the files. Raises CheckpointError if one that must be there is not."""
    for end in ends:
        if stem + end not in files:
            raise CheckpointError(f"tensor {stem + end} is missing in {files.folder}; download it again")
    return {end: stem + end for end in (*ends, *(end for end in optional if stem + end in files))}


def _compressed(files: Checkpoint, about: Mapping[str, Any]) -> Iterator[tuple[str, Stored]]:
    zero, index = "weight_zero_point", "weight_g_idx"
    for name in files.files:
        stem, _, end = name.rpartition(".")
        stem += "."
        if end == PACKED:
            if stem + "weight_global_scale" in files:
                raise UnsupportedModel(
                    f"{files.folder} holds 4-bit floats (NVFP4), which are not read: take the original weights"
                )
            parts = _partners(files, stem, (PACKED, SCALE, SHAPE), (zero, index))

            def shape(files: Checkpoint, where: str = stem + SHAPE) -> tuple[int, ...]:
                return tuple(files.read(where).tolist())

            def packed(t: Mapping[str, Tensor]) -> Tensor:
                rows, columns = t[SHAPE].tolist()
                return readers.from_packed_integers(t[PACKED], t[SCALE], (rows, columns), t.get(zero), t.get(index))

            yield stem + "weight", Stored(parts, shape, packed)
        elif end == SCALE and stem + "weight" in files:
            parts = _partners(files, stem, ("weight", SCALE), (zero,))
            yield stem + "weight", Stored(parts, _shape_of(stem + "weight"), partial(_scaled, _block_of(about)))


def _scaled(block: tuple[int, int], t: Mapping[str, Tensor]) -> Tensor:
    if t["weight"].is_floating_point():
        return readers.from_float8(t["weight"], t[SCALE], block)
    return readers.from_integers(t["weight"], t[SCALE], t.get("weight_zero_point"))


def _block_of(about: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block of float8 weights, as the config states it."""
    groups = about.get("config_groups", {}).values()
    stated = about.get("weight_block_size") or next(
        (found for g in groups if (found := (g.get("weights") or {}).get("block_structure"))), FLOAT8_BLOCK
    )
    rows, columns = stated
    return int(rows), int(columns)


def _float8(files: Checkpoint, about: Mapping[str, Any]) -> Iterator[tuple[str, Stored]]:
    for name in files.files:
        stem, _, end = name.rpartition(".")
        if end not in ("weight_scale_inv", SCALE):
            continue
        parts = _partners(files, stem + ".", ("weight", end))

        def read(t: Mapping[str, Tensor], scale: str = end) -> Tensor:
            return readers.from_float8(t["weight"], t[scale], _block_of(about))

        yield f"{stem}.weight", Stored(parts, _shape_of(f"{stem}.weight"), read)


def _mxfp4(files: Checkpoint, about: Mapping[str, Any]) -> Iterator[tuple[str, Stored]]:
    for name in files.files:
        if not name.endswith("_blocks"):
            continue
        stem = name.removesuffix("_blocks")
        parts = _partners(files, stem, ("_blocks", "_scales"))

        def shape(files: Checkpoint, blocks: str = name) -> tuple[int, ...]:
            experts, rows, groups, size = files.shape(blocks)
            return experts, groups * size * 2, rows

        def read(t: Mapping[str, Tensor]) -> Tensor:
            return readers.from_mxfp4(t["_blocks"], t["_scales"]).transpose(1, 2)  # the model holds (expert, in, out)

        yield stem, Stored(parts, shape, read)


def _gptq(files: Checkpoint, about: Mapping[str, Any]) -> Iterator[tuple[str, Stored]]:
    bits = int(about.get("bits", 4))
    less_one = about.get("checkpoint_format", "gptq") != "gptq_v2"
    for name in files.files:
        if not name.endswith(".qweight"):
            continue
        stem = name.removesuffix("qweight")
        parts = _partners(files, stem, ("qweight", "qzeros", "scales"), ("g_idx",))

        def shape(files: Checkpoint, words: str = name) -> tuple[int, ...]:
            rows, out = files.shape(words)
            return out, rows * 32 // bits

        def read(t: Mapping[str, Tensor]) -> Tensor:
            return readers.from_gptq(
                t["qweight"], t["qzeros"], t["scales"], t.get("g_idx"), bits=bits, stored_less_one=less_one
            )

        yield stem + "weight", Stored(parts, shape, read)


_FINDERS: dict[str, _Finder] = {
    "compressed-tensors": _compressed,
    "fp8": _float8,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
}
"""`quant_method` -> what finds the weights stored by it."""
