"""A saved state of which every process writes its own rows: safetensors and JSON, so that reading it runs no code.

FOLDER/LATEST names the last whole state, FOLDER/00000042/ holds it: rank-0.safetensors, ... and state.json, each with a
digest. Any number of processes can read what another number wrote.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from topiarist.checkpoints.atomic import save_tensors, write_atomically
from topiarist.checkpoints.journal import read_sealed, sealed
from topiarist.checkpoints.states import DIGEST, state_digest
from topiarist.core.errors import CheckpointError
from topiarist.pipelines.training.processes import Processes

LATEST, STATE = "LATEST", "state.json"


class ShardedState:
    """States of a run in one folder, the last whole one kept. Tensors of one or more axes are shards along the first."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder, self.processes = folder, processes

    def save(self, step: int, tensors: Mapping[str, Shaped[Tensor, "..."]], loop: Mapping[str, str]) -> None:
        """Save this process' rows of the state after `step`, and (the main process) what the loop needs.

        Raises CheckpointError in every process if it fails in one; the state before it is then untouched.
        """
        place = self.folder / f"{step:08d}"
        own = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}

        def write() -> None:
            place.mkdir(parents=True, exist_ok=True)
            digest = state_digest(own, own.__getitem__, {})
            save_tensors(place / _file(self.processes.rank), own, {DIGEST: digest})

        self._together(write, f"write {place}", "; the state before it is kept")

        def point() -> None:
            state = {"processes": self.processes.size, "loop": dict(loop)}
            write_atomically(place / STATE, sealed(state))
            write_atomically(self.folder / LATEST, place.name)
            for other in self.folder.iterdir():
                if other.is_dir() and other != place:
                    shutil.rmtree(other, ignore_errors=True)

        self.processes.on_main(point)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Shaped[Tensor, "..."]]) -> dict[str, str] | None:
        """Fill this process' `tensors` from the last whole state; return what `save` was told, None if there is none.

        Raises CheckpointError in every process if one finds its rows missing or damaged.
        """
        found = self.processes.on_main(self._find)
        if found is None:
            return None
        place, size, loop = found
        for work in (lambda: self._check(place, size), lambda: self._read(place, size, tensors)):
            self._together(work, f"read {place}", f"; delete {self.folder} to begin again")
        return loop

    def _find(self) -> tuple[Path, int, dict[str, str]] | None:
        latest = self.folder / LATEST
        if not latest.is_file():
            return None
        try:
            place = self.folder / f"{int(latest.read_bytes()):08d}"
        except ValueError:
            place = self.folder / "none"
        state = read_sealed(place / STATE)
        if state is None:
            raise CheckpointError(f"the saved state is damaged: delete {self.folder} to begin again")
        return place, state["processes"], state["loop"]

    def _check(self, place: Path, size: int) -> None:
        """Hold the files against their digests, each in one process. Raises CheckpointError if one differs."""
        for rank in range(self.processes.rank, size, self.processes.size):
            with safe_open(place / _file(rank), framework="pt") as file:
                metadata = dict(file.metadata() or {})
                if metadata.pop(DIGEST, "") != state_digest(file.keys(), file.get_tensor, metadata):
                    raise CheckpointError(f"{_file(rank)} is not what the run wrote")

    def _read(self, place: Path, size: int, tensors: Mapping[str, Tensor]) -> None:
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(place / _file(rank), framework="pt")) for rank in range(size)]
            for key, tensor in tensors.items():
                if tensor.ndim == 0:
                    tensor.copy_(files[0].get_tensor(key))
                    continue
                slices = [file.get_slice(key) for file in files]
                # As FSDP cuts: every process has as many rows as the first, but for those that find fewer left, or none.
                rows = sum(part.get_shape()[0] for part in slices)
                first = min(self.processes.rank * -(-rows // self.processes.size), rows)
                tensor.copy_(_rows(slices, first, len(tensor)))

    def _together(self, work: Callable[[], None], what: str, cure: str) -> None:
        """Do `work` in every process; raise CheckpointError, with the reason, in all of them if it fails in one."""
        reason = ""
        try:
            work()
        except (OSError, SafetensorError, RuntimeError, CheckpointError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        failed = [(rank, its) for rank, its in enumerate(self.processes.gather(reason)) if its]
        if failed:
            rank, reason = failed[0]
            by = f" (process {rank})" if self.processes.size > 1 else ""
            raise CheckpointError(f"cannot {what}: {reason}{by}{cure}")


def _file(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _rows(slices: list[Any], first: int, count: int) -> Tensor:
    """Rows first ... first + count of a tensor whose rows lie one slice after the other."""
    pieces, start = [], 0
    for part in slices:
        length = part.get_shape()[0]
        begin, end = max(first - start, 0), min(first + count - start, length)
        if begin < end:
            pieces.append(part[begin:end])
        start += length
    return torch.cat(pieces or [slices[0][:0]])
