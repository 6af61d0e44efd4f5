"""The published format of learned masks: an .npz of np.packbits(mask), key = parameter name + ".mask", nothing else."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from topiarist.core.errors import CheckpointError


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
                packed, total = archive[key], int(np.prod(shapes[name]))
                if packed.dtype != np.uint8 or packed.ndim != 1 or len(packed) != -(-total // 8):
                    raise CheckpointError(
                        f"{path}: {key} holds {packed.size:,} x {packed.dtype}, a mask of shape {shapes[name]} needs "
                        f"{-(-total // 8):,} bytes"
                    )
                masks[name] = torch.from_numpy(np.unpackbits(packed, count=total)).bool().view(shapes[name])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a readable .npz of masks ({error})") from error
    return masks


def write_npz(path: str | Path, masks: Mapping[str, Tensor]) -> None:
    """Write the published format. It knows no shapes, pattern or base model: prefer `save_masks`."""
    packed = {f"{name}.mask": np.packbits(mask.cpu().numpy()) for name, mask in masks.items()}
    with Path(path).open("wb") as stream:  # a path without .npz would be given the suffix
        np.savez_compressed(stream, **packed)  # pyright: ignore[reportArgumentType]
