"""What a long computation saves to go on after a kill."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from topiarist.checkpoints.atomic import disk_errors, save_tensors
from topiarist.checkpoints.reading import opened

KEPT = "; finished blocks are kept: mend it and run the same command again"
"""The cure of a full or read-only disk, for a run that resumes."""


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
        """Return what the last `save` was given; None if there is no file. Raises CheckpointError if it is damaged."""
        if not self.path.is_file():
            return None
        with opened(self.path) as reader:
            return {key: reader.get_tensor(key) for key in reader.keys()}, dict(reader.metadata() or {})  # noqa: SIM118

    def save(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Replace the file atomically. Raises CheckpointError if it cannot be written."""
        with disk_errors(f"cannot write to {self.path.parent}", cure=KEPT):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(self.path, tensors, metadata, cure=KEPT)
