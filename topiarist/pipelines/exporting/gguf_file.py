"""A checkpoint as one GGUF file, which llama.cpp and what is built on it open.

Weights that are on a grid keep their integers and scales where the type has a place for them; others are rounded by the gguf
package. Readers of the checkpoint round integer times scale to the scales' dtype, those of the file do not.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from topiarist.checkpoints.access import check_name
from topiarist.checkpoints.dequantised import DequantisedCheckpoint
from topiarist.checkpoints.reading import Checkpoint, locate
from topiarist.core.errors import CheckpointError, TopiaristError
from topiarist.core.grammar import OptionError
from topiarist.models.checks import check_finite_tensor
from topiarist.models.opened import open_model
from topiarist.pipelines.exporting import architecture as arch
from topiarist.pipelines.exporting import vocabulary
from topiarist.quantization.gguf_blocks import BLOCK, block_scales, q4_0, q8_0
from topiarist.quantization.grid import QuantizedWeight
from topiarist.runtime.manifest import new_place

Type = Literal["bf16", "q8_0", "q4_0"]
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+\.weight)")
Keeps = Literal["integers", "values", "neither"]
"""What of a quantised matrix is as it was."""
_ROUTER = ".ffn_gate_inp.weight"
"""Stays fp32 like the norms."""


@dataclass(frozen=True)
class Export:
    """What was written."""

    path: Path
    type: str
    tensors: int
    integers: int
    """Quantised matrices that keep their integers and scales."""
    values: int
    """Quantised matrices whose values are those of the checkpoint, in bf16."""
    rounded: int
    """Quantised matrices that had to be rounded again, for the type cannot hold them as they are."""
    nbytes: int


@dataclass(frozen=True)
class _Rows:
    """A tensor as it goes to the file."""

    name: str
    raw: Any
    """A member of gguf.GGMLQuantizationType."""
    shape: tuple[int, ...]
    """In elements of `dtype`."""
    dtype: type
    nbytes: int
    read: Callable[[], np.ndarray]
    keeps: Keeps | None = None


def export_gguf(
    folder: str | Path,
    out: str | Path,
    *,
    type: str | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Export:
    """Write a model folder, quantised or not, as `out`.

    type: of the matrices; default what the folder holds: q8_0 of 8-bit weights, q4_0 of 4-bit ones, else bf16.
    Embeddings and head of a q4_0 file are q8_0. progress: (what is going on, tensors done, tensors in all).
    The file appears when it is whole. Raises OptionError, UnsupportedModel or CheckpointError before any of it is written, and
    DamagedWeights for NaN or Inf.
    """
    gguf = _package()
    if type is not None and type not in get_args(Type):
        raise OptionError(f"a GGUF file of type {type!r} is not written; {', '.join(get_args(Type))} are")
    path, target = locate(folder), Path(out)
    if target.suffix != ".gguf":
        raise CheckpointError(
            f"{target} would be a GGUF file, which programs know by its name: call it {target.stem}.gguf"
        )
    check_name(target)
    if target.exists():
        raise CheckpointError(f"{target} exists; choose another name")
    opened = open_model(path)  # every tensor is there, with its shape
    checkpoint, config = opened.as_folder().checkpoint, opened.text_config
    architecture = arch.architecture_of(config)
    tokenizer = vocabulary.read(path)
    vocabulary.kind_of(tokenizer)
    kind: Any = type or _type_of(checkpoint)
    rows = list(_rows(checkpoint, config, architecture, kind))
    _check_room(target, sum(row.nbytes for row in rows))
    with new_place(target, cure="; make room and run the same command again") as temporary:
        writer = gguf.GGUFWriter(temporary, architecture.name)
        try:
            writer.add_name(path.resolve().name)
            writer.add_file_type(_file_type(kind))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            arch.write_settings(writer, config, architecture)
            vocabulary.write_vocabulary(writer, path, tokenizer, config.vocab_size)
            for row in rows:
                writer.add_tensor_info(row.name, row.shape, np.dtype(row.dtype), row.nbytes, raw_dtype=row.raw)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for number, row in enumerate(rows):
                progress("writing", number, len(rows))
                writer.write_tensor_data(row.read())
        finally:
            writer.close()
    kept = Counter(row.keeps for row in rows)
    return Export(target, kind, len(rows), kept["integers"], kept["values"], kept["neither"], target.stat().st_size)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise TopiaristError("GGUF files need the gguf package: pip install 'topiarist[gguf]'") from None
    return gguf


def _type_of(checkpoint: Checkpoint) -> Type:
    """The type that holds what the checkpoint holds."""
    if isinstance(checkpoint, DequantisedCheckpoint):
        inner = (name for name in checkpoint.files if re.search(r"\.\d+\.", name))
        grids = [weight.grid.bits for name in inner if (weight := checkpoint.quantized(name))]
        if grids:
            return "q4_0" if min(grids) == 4 else "q8_0"
    return "bf16"


def _file_type(kind: Type) -> Any:
    import gguf

    names = {"bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    return gguf.LlamaFileType[names[kind]]


def _check_room(target: Path, nbytes: int) -> None:
    if not target.parent.is_dir():
        raise CheckpointError(f"folder {target.parent} does not exist: make it first")
    free = shutil.disk_usage(target.parent).free
    if free < nbytes * 1.01:
        raise CheckpointError(f"{target} needs {nbytes / 1e9:.2f} GB, only {free / 1e9:.2f} GB are free: make room")


def _rows(checkpoint: Checkpoint, config: Any, architecture: arch.Architecture, kind: Type) -> Iterator[_Rows]:
    import gguf

    types = gguf.GGMLQuantizationType
    rename = arch.name_map(architecture, config)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for name, tensor in arch.extra_tensors(config):
        yield _floats(name, tensor.shape, lambda tensor=tensor: tensor)
    for name, members in sorted(_merged(checkpoint.files).items()):
        if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue
        new, parts = rename(name), [_Part(checkpoint, member, config, architecture) for member in members]
        if len(members) == 1 and (len(parts[0].shape) != 2 or new.endswith(_ROUTER)):
            yield _floats(new, parts[0].shape, parts[0].read)
            continue
        inner = new.startswith("blk.")
        raw = {"bf16": types.BF16, "q8_0": types.Q8_0, "q4_0": types.Q4_0 if inner else types.Q8_0}[kind]
        if parts[0].shape[1] % BLOCK:
            raw = types.BF16
        encoders = [part.encoder(raw) for part in parts]
        keeps = encoders[0].keeps if len({encoder.keeps for encoder in encoders}) == 1 else "neither"
        shape = parts[0].shape if len(members) == 1 else (len(members), *parts[0].shape)
        size = gguf.quant_shape_to_byte_shape(shape, raw)

        def make(encoders: Sequence[_Encoder] = encoders, size: tuple[int, ...] = size) -> np.ndarray:
            return np.concatenate([encoder.encode() for encoder in encoders]).reshape(size)

        yield _Rows(new, raw, size, np.uint8, int(np.prod(size)), make, keeps)


def _merged(names: Iterable[str]) -> dict[str, list[str]]:
    """The tensors of the files by what is one in GGUF: the experts of a block are stacked, in their order."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        expert = _EXPERT.fullmatch(name)
        merged = name if expert is None else f"{expert[1]}.{expert[3]}"
        found.setdefault(merged, {})[0 if expert is None else int(expert[2])] = name
    return {merged: [members[index] for index in sorted(members)] for merged, members in found.items()}


@dataclass(frozen=True)
class _Encoder:
    encode: Callable[[], np.ndarray]
    keeps: Keeps | None
    """None for a matrix that is not quantised."""


@dataclass(frozen=True)
class _Part:
    """One tensor of the files, as llama.cpp orders its rows."""

    checkpoint: Checkpoint
    name: str
    config: Any
    architecture: arch.Architecture

    @property
    def heads(self) -> int:
        """Heads whose rows have to be paired; 0 for none."""
        if not self.architecture.pairs_rows:
            return 0
        counts = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        return counts.get(self.name.split(".")[-2], 0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.checkpoint.shape(self.name)

    def read(self) -> Tensor:
        tensor = self.checkpoint.read(self.name)
        check_finite_tensor(self.name, tensor)
        return arch.paired_rows(tensor, self.heads) if self.heads else tensor

    def encoder(self, raw: Any) -> _Encoder:
        """What makes the bytes of the type `raw`, from the integers of the files where it has a place for them."""
        weight = self.checkpoint.quantized(self.name) if isinstance(self.checkpoint, DequantisedCheckpoint) else None
        if weight is None:
            return _Encoder(lambda: _encoded(self.read(), raw), None)
        check_finite_tensor(self.name, weight.scale)
        if self.heads:
            q, scale = (arch.paired_rows(tensor, self.heads) for tensor in (weight.q, weight.scale))
            weight = QuantizedWeight(q, scale, weight.grid)
        if blocks := _blocks(weight, raw):
            return _Encoder(blocks, "integers")
        same = raw.name == "BF16" and weight.scale.dtype == torch.bfloat16
        return _Encoder(lambda: _encoded(self.read(), raw), "values" if same else "neither")


def _floats(name: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> _Rows:
    """Norms and biases stay fp32: they are small, and llama.cpp adds and multiplies them in fp32."""
    import gguf

    nbytes = 4 * int(np.prod(shape))
    return _Rows(name, gguf.GGMLQuantizationType.F32, tuple(shape), np.float32, nbytes, lambda: read().float().numpy())


def _blocks(weight: QuantizedWeight, raw: Any) -> Callable[[], np.ndarray] | None:
    """The bytes of a weight on a grid where the type holds its integers and scales as they are."""
    scales = block_scales(weight)
    if scales is None or raw.name not in ("Q8_0", "Q4_0") or (raw.name == "Q4_0" and weight.grid.bits != 4):
        return None
    encode = q8_0 if raw.name == "Q8_0" else q4_0
    return lambda: encode(weight.q, scales).numpy()


def _encoded(tensor: Tensor, raw: Any) -> np.ndarray:
    import gguf

    if raw.name == "BF16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    return gguf.quants.quantize(tensor.float().numpy(), raw)
