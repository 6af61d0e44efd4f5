"""The walk that refits what consumed the units: block by block, attention first, on inputs from blocks already refit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from topiarist.core.errors import CalibrationWarning, NumericalError
from topiarist.core.gram import Gram
from topiarist.core.linalg import reconstruction_error
from topiarist.models.families import Matrix
from topiarist.models.opened import ObjectModel, at_rest
from topiarist.pipelines.common.stream import BlockStream
from topiarist.pipelines.shrinking.report import Refitted
from topiarist.structured import Kept, UnitGroup
from topiarist.structured.refit import refit_columns
from topiarist.structured.units import COLUMN_KINDS, HEAD_KINDS

STAGES = (HEAD_KINDS, ("channels",))
Saved = tuple[dict[str, Tensor], list[dict[str, Any]]]


def loaded_or_made(
    index: int, load: Callable[[int], Saved | None], save: Callable[[int, Saved], None], make: Callable[[], Saved]
) -> tuple[dict[str, Tensor], list[Refitted]]:
    """New weights and reports of one block: what an earlier try saved, or made now and saved."""
    done = load(index)
    if done is None:
        done = make()
        save(index, done)
    weights, rows = done
    return weights, [Refitted(**{**row, "shape": tuple(row["shape"])}) for row in rows]


def refit_consumers(
    source: ObjectModel,
    groups: Sequence[UnitGroup],
    kept: Kept,
    tokens: Int[Tensor, "num window"],
    *,
    batch_size: int,
    load: Callable[[int], Saved | None],
    save: Callable[[int, Saved], None],
    progress: Callable[[str, int, int], None],
) -> tuple[list[Refitted], list[str]]:
    """Overwrite the consumers' weights: zeros in the columns of units that go, least squares in the others.

    load, save: what an earlier try finished, block by block. Returns what was done, and warnings.
    """
    reports: list[Refitted] = []
    wanted = [group for group in groups if group.kind in COLUMN_KINDS and not bool(kept[group.key].all())]
    if not wanted:
        return [], []
    with at_rest(source.model):
        stream = BlockStream.of(source, tokens, batch_size=batch_size)
        for index in range(len(source.block_names)):
            progress("refitting", index, len(source.block_names))
            matrices = {f"{source.family.blocks}.{index}.{m.name}": m for m in source.matrices(index)}
            own = [group for group in wanted if group.block == index and stream.reaches(index)]
            weights, rows = loaded_or_made(index, load, save, partial(_block, stream, index, own, matrices, kept))
            for name, weight in weights.items():
                matrices[name].assign(weight)
            reports += rows
            stream.advance(index, source.load(index))
        stream.close()
    progress("refitting", len(source.block_names), len(source.block_names))
    thin = [f"{r.name} ({r.tokens} tokens, {r.shape[1]} inputs)" for r in reports if r.tokens < r.shape[1]]
    if not thin:
        return reports, []
    more = f" and {len(thin) - 8} more" if len(thin) > 8 else ""
    note = f"fewer calibration tokens than inputs for the refit of {', '.join(thin[:8])}{more}: add calibration samples"
    warnings.warn(note, CalibrationWarning, stacklevel=2)
    return reports, [note]


def _block(
    stream: BlockStream, index: int, groups: Sequence[UnitGroup], matrices: dict[str, Matrix], kept: Kept
) -> Saved:
    """New weights of one block's consumers, and their reports. The block itself ends with the new weights."""
    weights: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for kinds in STAGES:
        by_consumer: dict[str, list[UnitGroup]] = {}
        for group in groups:
            if group.kind in kinds:
                by_consumer.setdefault(group.consumer, []).append(group)
        if not by_consumer:
            continue
        stage = [matrices[name] for name in by_consumer]
        early = all(matrix.expert is None for matrix in stage)
        found = stream.grams(index, stream.source.load(index), stage, stop_early=early)
        grams = {matrix: group.gram for group in found for matrix in group.matrices}
        for name, sharing in by_consumer.items():
            matrix = matrices[name]
            weights[name], row = _refit(name, matrix, sharing, kept, grams.get(matrix))
            matrix.assign(weights[name])
            rows.append(row)
    return weights, rows


def _refit(
    name: str, matrix: Matrix, groups: Sequence[UnitGroup], kept: Kept, gram: Gram | None
) -> tuple[Tensor, dict[str, Any]]:
    ordered = sorted(groups, key=lambda group: group.start)
    columns = torch.cat([kept[group.key].repeat_interleave(group.width) for group in ordered]).to(matrix.weight.device)
    dense = matrix.weight
    plain = torch.where(columns, dense, 0.0)
    if gram is None:  # an expert that saw no token
        new, before, after, tokens = plain, 0.0, 0.0, 0
    else:
        try:
            H = gram.matrix
            new = refit_columns(dense, H, columns).to(dense.dtype)
        except NumericalError as error:
            raise NumericalError(f"refit of {name}: {error}") from error
        before, after = (reconstruction_error(dense, weight, H) for weight in (plain, new))
        tokens = gram.tokens
        if after > before:  # a thin Gram may mislead the solver's rounding; never hand back what is worse
            new, after = plain, before
    units, of = sum(int(kept[g.key].sum()) for g in ordered), sum(g.count for g in ordered)
    sparsity = 1.0 - float(columns.double().mean())
    row = Refitted(name, matrix.shape, f"{units} of {of}", sparsity, after, before, tokens)
    return new.clone(), asdict(row)
