"""Every layer solved at several levels from the dense model's Grams, on disk: what a search puts candidates together from."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topiarist.checkpoints.atomic import make_folder, save_tensors, write_atomically
from topiarist.checkpoints.reading import opened
from topiarist.checkpoints.states import DIGEST, state_digest
from topiarist.core.errors import CalibrationWarning, CheckpointError
from topiarist.core.patterns import Pattern, Unstructured
from topiarist.masks.bitpack import BITMAP, pack, unpack
from topiarist.models.opened import OpenedModel
from topiarist.pipelines.common.options import Progress
from topiarist.pipelines.common.stream import BlockStream
from topiarist.pipelines.pruning.block import BlockPruner
from topiarist.pipelines.training.processes import Processes
from topiarist.solvers import Solution, Solver

_ANY = Unstructured(0.0)
"""Masks are stored as bitmaps, whatever their pattern."""


ELSEWHERE = "; choose another work folder"


class Database:
    """A folder with a file for every block and level: the kept values and a bitmap of where they are.

    Every model, method and text has a folder of its own inside `work`, and `database.json` there says which. Files
    appear whole or not at all, so a run that was stopped goes on with the first one missing, and another sparsity adds
    the levels that it needs.

    made_of: JSON values that identify model, method and text. Raises CheckpointError if the folder cannot be made, and where
    a file that is read is damaged.
    """

    def __init__(self, work: Path, made_of: Mapping[str, Any]) -> None:
        text = json.dumps(made_of, sort_keys=True, indent=2) + "\n"
        self.folder = work / f"solutions-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        make_folder(self.folder, cure=ELSEWHERE)
        write_atomically(self.folder / "database.json", text)
        self._checked: set[tuple[Path, str]] = set()

    def path(self, block: int, pattern: Pattern) -> Path:
        """The file of one block at one level."""
        return self.folder / f"{block:05d}-{str(pattern).replace(':', 'of').replace('/', '-')}.safetensors"

    def write(self, block: int, pattern: Pattern, solutions: Mapping[str, Solution]) -> None:
        """Save the solutions of one block at one level, by layer name."""
        tensors: dict[str, Tensor] = {}
        digests: dict[str, str] = {}
        for name, solution in solutions.items():
            mask = solution.mask.cpu()
            of_layer = {f"{name}|values": solution.weight.cpu()[mask], f"{name}|mask": pack(mask, _ANY)[0]}
            digests[name] = state_digest(of_layer, of_layer.__getitem__, {})
            tensors |= of_layer
        save_tensors(self.path(block, pattern), tensors, {DIGEST: json.dumps(digests)})

    def read(self, block: int, pattern: Pattern, name: str, shape: tuple[int, int]) -> Float[Tensor, "out in"]:
        """The pruned weight of a layer, (out, in)."""
        path, parts = self.path(block, pattern), (f"{name}|values", f"{name}|mask")
        try:
            with opened(path) as reader:
                values, packed = map(reader.get_tensor, parts)
                found = dict(zip(parts, (values, packed), strict=True))
                if (path, name) not in self._checked and json.loads(reader.metadata()[DIGEST])[name] != state_digest(
                    parts, found.__getitem__, {}
                ):
                    raise ValueError("it is not what the search wrote")
        except (CheckpointError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"delete {path} and run the same command again, for it is damaged") from error
        self._checked.add((path, name))
        return torch.zeros(shape, dtype=values.dtype).masked_scatter_(unpack(packed, shape, _ANY, BITMAP), values)

    def missing(self, blocks: Iterable[int], patterns: Sequence[Pattern]) -> dict[int, list[Pattern]]:
        """Levels that are not there yet, by block."""
        absent = {block: [p for p in patterns if not self.path(block, p).is_file()] for block in blocks}
        return {block: levels for block, levels in absent.items() if levels}


@torch.no_grad()
def fill(
    database: Database,
    source: OpenedModel,
    solver: Solver,
    tokens: Int[Tensor, "num window"],
    names: Iterable[str],
    patterns: Sequence[Pattern],
    *,
    batch_size: int,
    progress: Progress,
    processes: Processes,
) -> None:
    """Solve what is missing, block by block; every block is put back as it was and run dense for the next.

    Windows and solving are divided among processes; the main one writes.
    """
    paths, wanted = source.block_names, set(names)
    missing = processes.on_main(lambda: database.missing(range(len(paths)), patterns))
    if not missing:
        return
    stream = BlockStream.of(source, tokens, batch_size=batch_size, processes=processes)
    for index in range(max(missing) + 1):
        progress("solving every level", index, max(missing) + 1)
        path, block = paths[index], source.load(index)
        matrices = [m for m in source.matrices(index) if f"{path}.{m.name}" in wanted]
        if index in missing:
            groups = stream.grams(index, block, matrices) if stream.reaches(index) else []
            dense = {m: m.weight.clone() for m in matrices}
            for number, pattern in enumerate(missing[index]):
                found: dict[str, Solution] = {}
                pruner = BlockPruner(
                    solver, dict.fromkeys(wanted, pattern), on_solution=found.__setitem__, processes=processes
                )
                try:
                    with warnings.catch_warnings():
                        if number:  # thin Grams are said once a block, not once a level
                            warnings.simplefilter("ignore", CalibrationWarning)
                        pruner.solve(groups, matrices, path)
                finally:
                    for matrix, weight in dense.items():
                        matrix.assign(weight)
                processes.on_main(partial(database.write, index, pattern, found))
        if index < max(missing):
            stream.advance(index, block)
        source.release(index)
