"""What of a model a run left as it was, and why: a row for every kind of part and reason."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from topiarist.core.patterns import Pattern
from topiarist.models.derive import OUTSIDE, is_unread
from topiarist.models.opened import OpenedModel

HEAD = "the output head"
EMBEDDINGS = "embeddings"
TOWER = "for other inputs than text"
BESIDE = "outside the decoder blocks"
SKIPPED = "skipped by the user"
ALLOCATED = "dense in the allocation"
LAST_BLOCK = "the most sensitive block"
NO_UNIT = "no part of the units"
UNCALLED = "not called for this text"


def left_dense(
    source: OpenedModel, changed: Collection[str], reasons: Mapping[str, str], *, otherwise: str = UNCALLED
) -> list[dict[str, Any]]:
    """List the parameters of two or more axes that a run did not change, largest first.

    changed: full names of matrices, or of parameters. reasons: why one that could have been changed was not, by its full
    name. otherwise: why all others were not.
    Each row has `what` (a name without its numbers), `matrices`, `weights`, and `why`.
    """
    matrices: dict[str, list[str]] = {}
    for index, path in enumerate(source.block_names):
        for matrix in source.matrices(index):
            matrices.setdefault(f"{path}.{matrix.path}", []).append(f"{path}.{matrix.name}")
    tied = getattr(source.model, "all_tied_weights_keys", None) or {}
    around = _around(source)
    found: dict[tuple[str, str], list[int]] = {}
    for name, parameter in source.model.named_parameters():
        if parameter.ndim < 2 or name in tied or name in changed:
            continue
        parts = matrices.get(name)
        if parts is None:
            why = [around.get(name) or _reason(source, name)]
        else:
            why = [reasons.get(part, otherwise) for part in parts if part not in changed]
        for reason in why:
            row = found.setdefault((_kind(source, name), reason), [0, 0])
            row[0] += 1
            row[1] += parameter.numel() // len(parts or why)
    rows = sorted(found.items(), key=lambda row: (-row[1][1], row[0]))
    return [{"what": what, "matrices": n, "weights": size, "why": why} for (what, why), (n, size) in rows]


def left_by_training(
    rows: Sequence[dict[str, Any]], source: OpenedModel, trained: Collection[str]
) -> list[dict[str, Any]]:
    """What of the rows of `left_dense` a later training of some parameters did not change either.

    trained: their full names; of a kind all or none are.
    """
    kinds = {_kind(source, name) for name in trained}
    return [row for row in rows if row["what"] not in kinds]


def why_dense(
    patterns: Mapping[str, Pattern | None], skip: Sequence[str], otherwise: str = ALLOCATED
) -> dict[str, str]:
    """Say of every matrix without a pattern whether an expression of `skip` names it, or what else it is."""
    skipped = [re.compile(expression) for expression in skip]
    return {
        name: SKIPPED if any(expression.search(name) for expression in skipped) else otherwise
        for name, pattern in patterns.items()
        if pattern is None
    }


def _around(source: OpenedModel) -> dict[str, str]:
    """Names of the weights of the head and the embeddings."""
    ends = ((source.model.get_output_embeddings(), HEAD), (source.model.get_input_embeddings(), EMBEDDINGS))
    names = {id(module): name for name, module in source.model.named_modules()}
    return {f"{names[id(module)]}.weight": what for module, what in ends if module is not None and id(module) in names}


def _reason(source: OpenedModel, name: str) -> str:
    """Why a parameter that is no prunable matrix is none."""
    if not name.startswith(f"{source.family.blocks}."):
        return TOWER if is_unread(source.model, name, source.family.blocks) else BESIDE
    inside = _kind(source, name, numbers=True)
    known = source.family.dense
    return known.get(inside) or known.get(inside.removesuffix(".weight")) or OUTSIDE


def _kind(source: OpenedModel, name: str, *, numbers: bool = False) -> str:
    """The name in its block, or in the model, without numbers and without `.weight`."""
    blocks = f"{source.family.blocks}."
    inside = name.removeprefix(blocks).partition(".")[2] if name.startswith(blocks) else name
    parts = [part for part in inside.split(".") if numbers or not part.isdigit()]
    return ".".join(parts) if numbers else ".".join(parts).removesuffix(".weight")
