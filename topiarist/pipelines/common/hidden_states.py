"""Room for the hidden states of all windows: in memory, or in a file where memory is too small."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch

from topiarist.checkpoints.atomic import disk_errors, make_folder

ELSEWHERE = "; choose another folder for --spill"


def check_spill(folder: Path) -> None:
    """Raise CheckpointError where a folder for hidden states cannot be made because something else is there; make none."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        make_folder(folder, cure=ELSEWHERE)


class HiddenStates:
    """(num, window, width) hidden states between two blocks, in the model's dtype, in memory or in a file.

    spill: folder for the file, which has no name and goes with the values; None: memory. Raises CheckpointError if there is no
    room for it.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, spill: Path | None) -> None:
        if spill is None:
            self.values = torch.empty(shape, dtype=dtype)
            return
        make_folder(spill, cure=ELSEWHERE)
        count = math.prod(shape)
        # The mapping outlives the file's name: a process that is killed leaves no file behind.
        with (
            disk_errors(f"cannot spill hidden states to {spill}", cure=ELSEWHERE),
            tempfile.NamedTemporaryFile(dir=spill, prefix="hidden-", suffix=".bin") as file,
        ):
            # In a file with holes a full disk would end the process, without a word.
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
            self.values = torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
