"""The published format of learned masks: an .npz of np.packbits(mask), key = parameter name + ".mask", nothing else."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topiarist.checkpoints.access import check_readable
from topiarist.checkpoints.atomic import replacing
from topiarist.core.errors import CheckpointError, PatternError

_DAMAGE = (
    OSError, ValueError, EOFError, KeyError, RuntimeError, SyntaxError, MemoryError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What numpy and zipfile raise for files that are none of theirs, encrypted, or spoiled anywhere."""


def read_npz(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Masks by parameter name.

    shapes: those of the model's parameters, because the file has none; masks of parameters it lacks are an error.
    Raises CheckpointError.
    """
    masks: dict[str, Tensor] = {}
    try:
        with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            for key in archive.files:
                name = key.removesuffix(".mask")
                name = name if name in shapes else f"{name}.weight"
                if name not in shapes:
                    raise CheckpointError(f"{path} has {key}, and the model no such parameter: it is for another model")
                total = math.prod(shapes[name])
                shape, dtype = _header(archive, key)
                if dtype != np.uint8 or shape != (-(-total // 8),):
                    raise CheckpointError(
                        f"{path}: {key} holds {' x '.join(map(str, shape))} {dtype}, a mask of shape {shapes[name]} needs "
                        f"{-(-total // 8):,} bytes"
                    )
                packed = archive[key]
                masks[name] = torch.from_numpy(np.unpackbits(packed, count=total)).bool().view(shapes[name])
    except _DAMAGE as error:
        if isinstance(error, CheckpointError):
            raise
        check_readable(Path(path))
        raise CheckpointError(f"{path} is not a readable .npz of masks ({error})") from error
    return masks


def _header(archive: Any, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) that an array states, before memory is taken for it."""
    with archive.zip.open(f"{key}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    return shape, dtype


def write_npz(path: str | Path, masks: Mapping[str, Tensor]) -> None:
    """Write the published format. It knows no shapes, pattern or base model: prefer `save_masks`. Atomic.

    Raises PatternError for a mask that is not bool, CheckpointError if the file cannot be written.
    """
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise PatternError(f"the mask of {name} is {mask.dtype}, and True means kept: give a bool mask")
    packed = {f"{name}.mask": np.packbits(mask.cpu().numpy()) for name, mask in masks.items()}
    with replacing(Path(path)) as new, new.open("wb") as stream:  # a path without .npz would be given the suffix
        np.savez_compressed(stream, **packed)  # pyright: ignore[reportArgumentType]
