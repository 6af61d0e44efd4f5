"""Room for the hidden states of all windows: in memory, or in a file where memory is too small."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch


class HiddenStates:
    """(num, window, width) hidden states between two blocks, in the model's dtype, in memory or in a file.

    spill: folder for the file, which goes with the object; None: memory.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, spill: Path | None) -> None:
        self._file = None
        if spill is None:
            self.values = torch.empty(shape, dtype=dtype)
        else:
            spill.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.NamedTemporaryFile(dir=spill, prefix="hidden-", suffix=".bin")  # noqa: SIM115
            count = shape[0] * shape[1] * shape[2]
            self.values = torch.from_file(self._file.name, shared=True, size=count, dtype=dtype).view(shape)
