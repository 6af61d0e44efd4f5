"""A model folder, ordinary or packed, as a model ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from topiarist.core.errors import CheckpointError, TopiaristError
from topiarist.models.opened import open_model
from topiarist.runtime.packed import MANIFEST, from_packed


def load_model(folder: Path | str, *, device: str = "cpu") -> Any:
    """A causal LM of transformers in its own dtype, in evaluation mode.

    Raises CheckpointError if the folder cannot be read.
    """
    try:
        packed = (Path(folder) / MANIFEST).exists()
        model = from_packed(folder) if packed else open_model(str(folder), device=device).whole().model
    except TopiaristError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load a model from {folder}: {error}") from error
    return model.to(device).eval()
