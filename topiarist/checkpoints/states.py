"""What a long computation saves to go on after a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from jaxtyping import Shaped
from torch import Tensor

from topiarist.checkpoints.access import check_readable
from topiarist.checkpoints.atomic import disk_errors, save_tensors
from topiarist.checkpoints.reading import opened
from topiarist.checkpoints.streaming import tensor_bytes
from topiarist.core.errors import CheckpointError

KEPT = "; what is finished is kept: mend it and run the same command again"
"""The cure of a full or read-only disk, for a run that resumes."""

DIGEST = "state_sha256"
"""Of a saved state, in its metadata."""


class SavedState:
    """Tensors and metadata that outlive the process. This one forgets; that of an output folder does not."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Return what the last `save` was given; None at a fresh start."""
        return None

    def save(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Replace the saved state."""


class FileState(SavedState):
    """A saved state in one safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Return what the last `save` was given; None if there is no file.

        Raises CheckpointError if it is damaged, or cannot be read.
        """
        if not self.path.is_file():
            return None
        check_readable(self.path)
        try:
            with opened(self.path) as reader:
                tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
                metadata = dict(reader.metadata() or {})
        except CheckpointError as error:
            raise CheckpointError(f"{self._damaged()}: {error.__cause__}") from error
        if metadata.pop(DIGEST, "") != state_digest(tensors, tensors.__getitem__, metadata):
            raise CheckpointError(f"{self._damaged()}: it is not what the run wrote")
        return tensors, metadata

    def _damaged(self) -> str:
        return f"delete {self.path} and run the same command again, for it is damaged"

    def save(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Replace the file atomically. Raises CheckpointError if it cannot be written."""
        with disk_errors(f"cannot write to {self.path.parent}", cure=KEPT):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        digest = state_digest(tensors, tensors.__getitem__, metadata)
        save_tensors(self.path, tensors, {**metadata, DIGEST: digest}, cure=KEPT)


def state_digest(
    names: Iterable[str], read: Callable[[str], Shaped[Tensor, "..."]], metadata: Mapping[str, str]
) -> str:
    """sha256 over names, shapes and values: a state with one bit turned would go on to other bytes, unnoticed.

    read: gives a tensor by its name; they are asked for one after the other.
    """
    total = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(names):
        tensor = read(name)
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor_bytes(tensor))
    return total.hexdigest()
