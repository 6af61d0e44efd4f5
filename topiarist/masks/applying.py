"""Masks put on a folder: the base's weights with zeros, as an ordinary checkpoint with report, card and page."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from topiarist.checkpoints.reading import Checkpoint, locate
from topiarist.checkpoints.references import reference
from topiarist.checkpoints.side_files import side_files
from topiarist.checkpoints.streaming import tensor_bytes
from topiarist.checkpoints.writing import OutputFolder
from topiarist.core.errors import CheckpointError, TopiaristError
from topiarist.data.record import RECORD, record, recorded_passages
from topiarist.masks.files import MaskFile, masked
from topiarist.models.folder import FolderModel
from topiarist.results.papers import write_papers
from topiarist.results.report import RunReport
from topiarist.results.result import chained


@dataclass(frozen=True)
class MaskedLayer:
    """One masked parameter; stacked experts are one."""

    name: str
    shape: list[int]
    pattern: str
    sparsity: float


@dataclass(kw_only=True)
class ApplyReport(RunReport):
    """The result of `apply`."""

    pipeline: ClassVar[str] = "apply"
    derived: ClassVar[tuple[str, ...]] = ("sparsity",)
    parts: ClassVar[Mapping[str, Callable[[Any], Any]]] = {"layers": lambda plain: MaskedLayer(**plain)}

    masks: str
    """Name of the mask file."""
    modules: Mapping[str, Mapping[str, str]]
    """Pattern of every masked matrix."""
    layers: list[MaskedLayer] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all masked weights."""
        sizes = [math.prod(layer.shape) for layer in self.layers]
        return sum(layer.sparsity * size for layer, size in zip(self.layers, sizes, strict=True)) / max(sum(sizes), 1)

    def provenance(self) -> dict[str, Any]:
        """The mask file, and the pattern of every matrix."""
        return {"masks": self.masks, "modules": dict(self.modules)}


def apply(base: str | Path, masks: str | Path | MaskFile, out: str | Path) -> Path:
    """Write the base folder with its masks applied to `out`: ordinary dense tensors with zeros, any loader opens them.

    Every weight is checked against the file before anything is written. Raises CheckpointError for another base, naming
    the first tensor that differs, and for an output that holds something else. A stopped run resumes.
    """
    file = masks if isinstance(masks, MaskFile) else MaskFile(masks)
    checkpoint = Checkpoint(locate(base))
    list(side_files(checkpoint.folder))  # refused before any work, not at the end
    source = _converted(checkpoint, file)
    for name in file:
        file.check(name, checkpoint.read(name) if source is None else source.parameter(name))
    fingerprint = {
        "apply": hashlib.sha256(json.dumps(file.metadata, sort_keys=True).encode()).hexdigest(),
        "base": checkpoint.digest(),
    }
    seen = recorded_passages(checkpoint.folder / RECORD) | recorded_passages(file.path.parent / RECORD)
    with OutputFolder(out, fingerprint) as output:
        if not output.complete:
            output.begin(checkpoint.weight_bytes())
            _apply(base, checkpoint, file, output, seen)
    return output.folder


def _apply(
    base: str | Path, checkpoint: Checkpoint, file: MaskFile, output: OutputFolder, seen: frozenset[int]
) -> None:
    write_masked(output, checkpoint, file)
    patterns = sorted({entry.pattern for entry in file.entries.values()})
    size, dtype = checkpoint.weight_bytes(), str(checkpoint.dtype()).removeprefix("torch.")
    report = ApplyReport(
        method="masks",
        settings={},
        pattern=patterns[0] if len(patterns) == 1 else "mixed",
        model=str(base),
        base_model=reference(base, output.folder),
        base_digest=output.fingerprint["base"],
        masks=file.path.name,
        modules={name.removesuffix(".weight"): {"pattern": entry.pattern} for name, entry in file.entries.items()},
        layers=[
            MaskedLayer(name.removesuffix(".weight"), list(entry.shape), entry.pattern, _zeros(file[name]))
            for name, entry in file.entries.items()
        ],
        weights={"before": size, "after": size, "dtype": dtype, **chained(checkpoint.folder)},
        command=["topiarist", "apply", str(base), str(file.path), "OUT"],
    )
    texts = {RECORD: record("", seen)} if seen else {}
    write_papers(output, report, checkpoint.config, side_files=checkpoint.folder, texts=texts)


def _zeros(mask: Bool[Tensor, "..."]) -> float:
    """The share of weights that go."""
    return 1.0 - int(mask.sum()) / mask.numel()


def write_masked(
    output: OutputFolder, checkpoint: Checkpoint, file: MaskFile, *, replaced: Mapping[str, Tensor] | None = None
) -> None:
    """Write the checkpoint's tensors, masked, as files of `output`; files that an earlier try finished stay.

    replaced: weights (by parameter name) that are written in place of the checkpoint's, masked as well.
    """
    source = _converted(checkpoint, file)
    owner = {} if source is None else {key: name for name in file for key in source.names.keys([name])}

    def weight_of(name: str, read: Callable[[str], Tensor]) -> Tensor:
        weight = replaced[name].cpu() if replaced is not None and name in replaced else read(name)
        return masked(weight, file[name]) if name in file else weight

    @lru_cache(maxsize=4)  # the tensors of one group of experts stand together
    def pieces(name: str) -> dict[str, Tensor]:
        assert source is not None
        return source.stored({n: weight_of(n, source.parameter) for n in source.names.group(name).targets})

    def final(part: str) -> Iterable[bytes | memoryview]:
        if part in owner:
            return [tensor_bytes(pieces(owner[part])[part])]
        if part not in file:
            return checkpoint.chunks(part)
        stored = checkpoint.read(part)
        return [tensor_bytes(weight_of(part, lambda _: stored).to(stored.dtype))]

    output.done()
    output.write_files({part: checkpoint.stored(part) for part in checkpoint.files}, final)


def _converted(checkpoint: Checkpoint, file: MaskFile) -> FolderModel | None:
    """What reads masked parameters that are stored under other names or in pieces; None if all are stored as they are.

    Raises CheckpointError if the checkpoint lacks one: it is another model.
    """
    if all(name in checkpoint for name in file):
        return None
    try:
        source = FolderModel(checkpoint, device=torch.device("cpu"))
    except TopiaristError:  # then only plain names can be found
        source = None
    if lacking := next((n for n in file if (n not in source.names if source else n not in checkpoint)), None):
        raise CheckpointError(
            f"{file.path} was made for another base model ({file.base_model}): {checkpoint.folder} has no {lacking}"
        )
    return source
