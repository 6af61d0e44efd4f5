"""A checkpoint as one GGUF file, which llama.cpp and what is built on it open.

Weights that are on a grid keep their very values where the type has a place for them; others are rounded by the gguf package.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from topiarist.checkpoints.atomic import replacing
from topiarist.checkpoints.dequantised import DequantisedCheckpoint, readable
from topiarist.checkpoints.reading import Checkpoint, locate
from topiarist.core.errors import CheckpointError, TopiaristError
from topiarist.core.grammar import OptionError
from topiarist.models.opened import open_model
from topiarist.pipelines.exporting import architecture as arch
from topiarist.pipelines.exporting import vocabulary
from topiarist.quantization.gguf_blocks import BLOCK, block_scales, q4_0, q8_0
from topiarist.quantization.grid import QuantizedWeight

Type = Literal["bf16", "q8_0", "q4_0"]
_ROTATED = ("q_proj", "k_proj")


@dataclass(frozen=True)
class Export:
    """What was written."""

    path: Path
    type: str
    tensors: int
    exact: int
    """Quantised matrices whose values are those of the checkpoint."""
    rounded: int
    """Quantised matrices that had to be rounded again, for their groups or scales have no place in the type."""
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
    exact: bool | None = None


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
    The file appears when it is whole. Raises OptionError, UnsupportedModel or CheckpointError before any of it is written.
    """
    gguf = _package()
    from transformers import AutoConfig

    if type is not None and type not in get_args(Type):
        raise OptionError(f"a GGUF file of type {type!r} is not written; {', '.join(get_args(Type))} are")
    path, target = locate(folder), Path(out)
    if target.exists():
        raise CheckpointError(f"{target} exists; choose another name")
    open_model(str(path))  # every tensor is there, with its shape
    checkpoint = readable(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config(decoder=True)
    architecture = arch.architecture_of(config)
    vocabulary.kind_of(vocabulary.read(path))
    kind: Any = type or _type_of(checkpoint)
    rows = list(_rows(checkpoint, config, architecture, kind))
    _check_room(target, sum(row.nbytes for row in rows))
    with replacing(target, cure="; make room and run the same command again") as temporary:
        writer = gguf.GGUFWriter(temporary, architecture.name)
        try:
            writer.add_name(path.resolve().name)
            writer.add_file_type(_file_type(kind))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            arch.write_settings(writer, config, architecture)
            vocabulary.write_vocabulary(writer, path, config.vocab_size)
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
    exact = [row.exact for row in rows if row.exact is not None]
    return Export(target, kind, len(rows), sum(exact), len(exact) - sum(exact), target.stat().st_size)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise TopiaristError("GGUF files need the gguf package: pip install 'topiarist[gguf]'") from None
    return gguf


def _type_of(checkpoint: Checkpoint) -> Type:
    """The type that holds what the checkpoint holds."""
    if isinstance(checkpoint, DequantisedCheckpoint):
        grids = [w.grid.bits for name in checkpoint.files if (w := checkpoint.quantized(name)) and ".layers." in name]
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
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for name, tensor in arch.extra_tensors(config):
        yield _floats(name, tensor.shape, lambda tensor=tensor: tensor)
    for name in sorted(checkpoint.files):
        if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue
        shape = checkpoint.shape(name)
        module = name.split(".")[-2]
        count = heads[module] if architecture.pairs_rows and module in _ROTATED else 0

        def read(name: str = name, count: int = count) -> Tensor:
            tensor = checkpoint.read(name)
            return arch.paired_rows(tensor, count) if count else tensor

        if len(shape) != 2:
            yield _floats(rename(name), shape, read)
            continue
        inner = ".layers." in name
        raw = {"bf16": types.BF16, "q8_0": types.Q8_0, "q4_0": types.Q4_0 if inner else types.Q8_0}[kind]
        if shape[1] % BLOCK:
            raw = types.BF16
        weight = checkpoint.quantized(name) if isinstance(checkpoint, DequantisedCheckpoint) else None
        if weight is not None and count:
            weight = QuantizedWeight(
                arch.paired_rows(weight.q, count), arch.paired_rows(weight.scale, count), weight.grid
            )
        blocks = None if weight is None else _exact(weight, raw)
        make = (lambda read=read, raw=raw: _encoded(read(), raw)) if blocks is None else blocks
        exact = None if weight is None else blocks is not None or raw == types.BF16
        size = gguf.quant_shape_to_byte_shape(shape, raw)
        yield _Rows(rename(name), raw, size, np.uint8, int(np.prod(size)), make, exact)


def _floats(name: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> _Rows:
    """Norms and biases stay fp32: they are small, and llama.cpp adds and multiplies them in fp32."""
    import gguf

    nbytes = 4 * int(np.prod(shape))
    return _Rows(name, gguf.GGMLQuantizationType.F32, tuple(shape), np.float32, nbytes, lambda: read().float().numpy())


def _exact(weight: QuantizedWeight, raw: Any) -> Callable[[], np.ndarray] | None:
    """The bytes of a weight on a grid where the type holds its values as they are."""
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
