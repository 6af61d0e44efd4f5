"""What the files of a shrunk checkpoint hold, against what its PruneSpec says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from topiarist.checkpoints.reading import Checkpoint, locate
from topiarist.models.folder import FolderModel
from topiarist.structured.spec import SPEC, PruneSpec
from topiarist.structured.units import COLUMN_KINDS, HIDDEN


@dataclass(frozen=True)
class UnitAudit:
    """One matrix that consumes units, or the blocks of the model."""

    name: str
    kind: str
    kept: int
    of: int
    holds: bool
    """Whether as many input columns are in use as the kept units have."""


@dataclass(frozen=True)
class ShrunkAudit:
    """A shrunk checkpoint."""

    spec: PruneSpec
    parameters: int
    """In the files."""
    units: list[UnitAudit]

    @property
    def holds(self) -> bool:
        """Whether the parameters are as many as the spec says, and every unit is as it says."""
        return self.parameters == self.spec.parameters["stored"] and all(unit.holds for unit in self.units)


def audit_shrunk(folder: str | Path) -> ShrunkAudit | None:
    """Count what is in the files of a shrunk checkpoint; None if the folder has no PruneSpec."""
    path = locate(folder)
    if not (path / SPEC).is_file():
        return None
    checkpoint, spec = Checkpoint(path), PruneSpec.load(path)
    source = FolderModel(checkpoint, device=torch.device("cpu"))
    rows = spec.by_block()
    blocks = source.block_names
    units: list[UnitAudit] = []
    if whole := [row for row in rows if row["kind"] == "block"]:
        kept = sum(row["kept"] for row in whole)
        holds = len(blocks) == (len(whole) if spec.layout == "masked" else kept)
        units.append(UnitAudit(source.family.blocks, "block", kept, len(whole), holds))
    for row in (row for row in rows if row["kind"] == HIDDEN):
        width = int(source.text_config.hidden_size)
        units.append(UnitAudit(row["name"], HIDDEN, row["kept"], row["of"], width == row["kept"]))
    numbers = [row["block"] for row in whole if row["kept"] or spec.layout == "masked"] or list(range(len(blocks)))
    for index, (number, block) in enumerate(zip(numbers, blocks, strict=False)):
        own = {}
        for row in rows:
            if row["block"] == number and row["kind"] in COLUMN_KINDS:
                name = row["name"] if row["kind"] != "heads" else row["name"].rpartition(".")[0]
                own.setdefault((name, row["kind"]), []).append(row)
        if not own:
            continue
        source.load(index)
        for matrix in source.matrices(index):
            for kind in COLUMN_KINDS:
                same = own.get((f"{source.family.blocks}.{number}.{matrix.name}", kind))
                if same:
                    kept, slots = (sum(row[key] for row in same) for key in ("kept", "slots"))
                    live, columns = int((matrix.weight != 0).any(0).sum()), matrix.shape[1]
                    # A kept column may be all zeros by itself; one that went may not hold anything.
                    holds = columns % slots == 0 and live <= kept * (columns // slots)
                    units.append(UnitAudit(f"{block}.{matrix.name}", kind, kept, sum(r["of"] for r in same), holds))
        source.release(index)
    named = dict(source.model.named_parameters(remove_duplicate=False))
    buffers = sum(tensor.numel() for name, tensor in source.model.state_dict().items() if name not in named)
    parameters = sum(checkpoint.numel(name) for name in checkpoint.files) - buffers
    return ShrunkAudit(spec, parameters, units)
