"""Reader for orphaned compressed-tensors checkpoints: formats `sparse-bitmask` and `sparse-24-bitmask`.

The library dropped both in 2026, and with them the loaders; models published in them no longer open. Per pruned weight
such a file holds, under the weight's name with or without its `.weight`:

    compressed   the values: flat (bitmask), or (rows, cols / 2) (2:4)
    bitmask      uint8 (rows, ceil(cols / 8)), least significant bit first, each row filled up to a whole byte
    shape        int64, the dense shape, in any arrangement
    row_offsets  int64 (rows,), where each row's values begin (bitmask only)

Other tensors are stored as they are. If the weights were quantised as well, the values are the quantised ones and the
rest of the quantisation stays: what comes out is an ordinary quantised checkpoint.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from topiarist.checkpoints.reading import Checkpoint, read_json
from topiarist.core.errors import CheckpointError
from topiarist.runtime.bits import raw_bits
from topiarist.runtime.manifest import new_folder
from topiarist.runtime.packed import SHARD_BYTES, copy_other_files, write_dense

FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
PARTS = ("compressed", "bitmask", "shape", "row_offsets")
_CONFIG_KEYS = ("quantization_config", "compression_config")  # the second was the key until 2024


def sparse_format(folder: Path | str) -> str | None:
    """The compressed-tensors sparse format that a model folder's config names, or None."""
    config = _read_config(Path(folder))
    for key in _CONFIG_KEYS:
        found = _part(_part(config.get(key), "sparsity_config"), "format")
        if found and found != "dense":
            return found
    return None


def convert_legacy(src: Path | str, out: Path | str, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write an ordinary dense checkpoint of a legacy one, which any current loader opens.

    Raises CheckpointError if `src` is of another format, or damaged, or if `out` exists.
    """
    src = Path(src)
    found = sparse_format(src)
    if found not in FORMATS:
        named = f"is in format {found!r}" if found else "is not packed, and names no sparse format in its config.json"
        raise CheckpointError(f"{src} {named}; unpack reads what pack wrote, {' and '.join(FORMATS)}")
    with new_folder(out) as partial:
        write_dense(read_legacy(src), partial, shard_bytes=shard_bytes)
        copy_other_files(src, partial)
        config = dense_config(_read_config(src))
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_legacy(folder: Path | str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, dense, one at a time; parts of a weight may lie in different files."""
    checkpoint = Checkpoint(folder)
    weights: dict[str, list[str]] = defaultdict(list)
    plain: list[str] = []
    for name in checkpoint.files:
        stem, _, part = name.rpartition(".")
        if part in PARTS and stem:
            weights[stem].append(part)
        else:
            plain.append(name)
    for stem, parts in weights.items():
        missing = {"compressed", "bitmask", "shape"} - set(parts)
        if missing:
            raise CheckpointError(
                f"{stem} in {folder} lacks its {' and '.join(sorted(missing))}; copy the folder again"
            )
        tensors = {part: checkpoint.read(f"{stem}.{part}") for part in parts}
        try:
            weight = decode(**tensors)
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
            raise CheckpointError(f"{stem} in {folder} is damaged ({error}); copy the folder again") from None
        yield stem if stem.endswith(".weight") else f"{stem}.weight", weight
    for name in plain:
        yield name, checkpoint.read(name)


def decode(
    compressed: Shaped[Tensor, "..."],
    bitmask: Shaped[Tensor, "..."],
    shape: Shaped[Tensor, "..."],
    row_offsets: Shaped[Tensor, "..."] | None = None,
) -> Shaped[Tensor, "rows cols"]:
    """The dense weight (rows, cols) in the dtype of `compressed`. Raises ValueError if the parts do not agree."""
    rows, cols = (int(size) for size in shape.flatten())
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != (rows, -(-cols // 8)):
        raise ValueError(f"a bitmask of shape {tuple(bitmask.shape)} does not fit a weight of {rows} x {cols}")
    bits = np.unpackbits(bitmask.numpy(), axis=1, count=cols, bitorder="little")
    mask = torch.from_numpy(bits).view(torch.bool)
    values = raw_bits(compressed).flatten()
    counts = mask.sum(1)
    if int(counts.sum()) != values.numel():
        raise ValueError(f"{values.numel()} values for {int(counts.sum())} bits")
    if row_offsets is not None and not torch.equal(row_offsets.flatten(), counts.cumsum(0) - counts):
        raise ValueError("row offsets that do not follow from the bitmask")
    dense = torch.zeros(rows, cols, dtype=values.dtype)
    dense[mask] = values
    return dense.view(compressed.dtype)


def dense_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config without its sparse format, which current vLLM refuses; a quantisation that it also holds stays."""
    config = dict(config)
    for key in _CONFIG_KEYS:
        if isinstance(config.get(key), dict):
            rest = {name: value for name, value in config[key].items() if name != "sparsity_config"}
            config.pop(key)
            if rest.get("config_groups"):
                config["quantization_config"] = rest
    return config


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"cannot read {path}: there is no such file")
    return read_json(path, cure="copy the folder again")


def _part(stated: Any, key: str) -> Any:
    """An entry of a JSON object; None of whatever else stands there."""
    return stated.get(key) if isinstance(stated, dict) else None
