"""Perplexities of several models on several texts, the dense model first."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from topiarist.checkpoints.reading import Checkpoint, locate
from topiarist.checkpoints.references import resolved
from topiarist.checkpoints.writing import ADAPTER
from topiarist.core.errors import CalibrationError, TopiaristError
from topiarist.data import MAX_SHARED, Bos, TextFiles, Windows, check_vocabulary, evaluation_windows
from topiarist.data.record import RECORD, recorded_passages
from topiarist.evaluation.adapter import check_adapters, has_adapter, with_adapter
from topiarist.evaluation.perplexity import Perplexity, check_batch_size, perplexity
from topiarist.models.derive import check_has_text_loss
from topiarist.models.opened import OpenedModel, open_model

MANY_ZEROS = 0.1
"""Share of zero weights above which a model is no dense reference."""
OF_TEXT = {
    "text_field": "text",
    "split": None,
    "window": 1024,
    "max_windows": None,
    "bos": "auto",
    "allow_overlap": False,
}
"""Settings that only perplexity heeds, with their defaults."""


@dataclass(frozen=True)
class Row:
    """Perplexities of one model, one for every text."""

    model: str
    dense: bool
    results: list[Perplexity]
    base: str | None = None
    """Of a pruned model: the row of the dense model that it was made of."""


def compare(
    models: Sequence[str],
    texts: Sequence[TextFiles],
    *,
    window: int = 1024,
    max_windows: int | None = None,
    batch_size: int = 1,
    device: str | None = None,
    reference: bool = True,
    allow_overlap: bool = False,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    bos: Bos = "auto",
    adapter: bool = False,
    ready: Callable[[], object] = lambda: None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Row]:
    """Perplexity of every model on every text, dense models first.

    With `reference`, the base of every pruned model joins if it can be found. All windows are made, and refused, before any
    model is loaded. tokenizer: a folder or an object, for all models. bos: see `topiarist.data.Bos`. adapter: put the low-rank
    companion of every model that has one on it. ready: called once all windows are made, before any model is loaded.
    Raises as `open_model` and `held_out_windows` do.
    """
    check_batch_size(batch_size)
    if adapter:
        check_adapters([str(name) for name in models])
    prepared = []
    for name, dense, base in with_reference(models, reference):
        opened = open_model(name, device=device, trust_remote_code=trust_remote_code, tokenizer=tokenizer)
        check_has_text_loss(opened.model, "perplexity")
        made = [
            held_out_windows(opened, text, window=window, max_windows=max_windows, allow_overlap=allow_overlap, bos=bos)
            for text in texts
        ]
        prepared.append((name, dense, base, opened, made))
    ready()
    rows = []
    for name, dense, base, opened, made in prepared:
        model, label = opened.whole().model, Path(name).name
        if adapter and has_adapter(name):
            model, name = with_adapter(model, name), f"{name} + {ADAPTER}"
        results = [
            perplexity(model, w, batch_size=batch_size, progress=lambda done, total, n=label: progress(n, done, total))
            for w in made
        ]
        rows.append(Row(name, dense and is_dense(name, model), results, base))
        del model
    return sorted(rows, key=lambda row: not row.dense)


def check_heeded(texts: Sequence[object], **asked: object) -> None:
    """Raise TopiaristError for a setting of text, of those in `OF_TEXT`, where no text is named."""
    changed = next((name for name, value in asked.items() if value != OF_TEXT[name]), None)
    if not texts and changed is not None:
        raise TopiaristError(
            f"{changed.replace('_', ' ')} is a setting of text, and none is named: name text, or leave that out"
        )


def held_out_windows(
    model: str | Path | OpenedModel,
    text: TextFiles,
    *,
    window: int,
    max_windows: int | None = None,
    allow_overlap: bool = False,
    bos: Bos = "auto",
) -> Windows:
    """Evaluation windows for a checkpoint, by its own tokenizer.

    Raises CalibrationError if the checkpoint was pruned on that very text (its calibration is written beside it), if a
    window is longer than its learned positions, or if a token is outside its vocabulary.
    """
    opened = model if isinstance(model, OpenedModel) else open_model(model, device="cpu")
    opened.check_length(window, f"a window of {window} tokens", f"--window {opened.limit}")
    known = recorded_passages(opened.beside(RECORD))
    windows = evaluation_windows(
        text, opened.tokenizer(), window=window, max_windows=max_windows, calibration=known, bos=bos
    )
    check_vocabulary(windows.tokens, opened.vocabulary, "text")
    if windows.overlap > MAX_SHARED and not allow_overlap:
        names = ", ".join(str(p) for p in text.paths)
        raise CalibrationError(
            f"{windows.overlap:.0%} of {names} is calibration text of {opened.name}: the result would flatter it; evaluate "
            "on other text"
        )
    return windows


def with_reference(models: Sequence[str], reference: bool = True) -> list[tuple[str, bool, str | None]]:
    """(model, whether it counts as dense, the one among them that a pruned model was made of), dense ones first.

    With `reference`, the base of every pruned model joins. A warning says if one cannot be found or is not the model that
    was pruned.
    """
    names = [str(name) for name in models]
    named = [name for name in names if _base_of(name) is None]
    digest_of = cache(
        lambda folder: Checkpoint(folder).digest()
    )  # which reads all of a model: once for all of its results
    added: list[str] = []
    bases: dict[str, str | None] = dict.fromkeys(named)
    for name in names:
        if name not in bases:
            found = _own_base(name, named, digest_of, warn=reference)
            if found is not None and found not in named:
                known = next((base for base in added if Path(base).samefile(found)), None)
                found = known or (found if reference else None)
                added += [found] if found is not None and known is None else []
            bases[name] = found
    own = ((name, name in named, bases[name]) for name in names)
    return [*((base, True, None) for base in added), *sorted(own, key=lambda entry: not entry[1])]


def is_dense(name: str, model: nn.Module) -> bool:
    """Whether few weights are zero. A warning says so if it is no dense model after all."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    zeros = sum(int((matrix == 0).sum()) for matrix in matrices) / max(sum(matrix.numel() for matrix in matrices), 1)
    if zeros > MANY_ZEROS:
        warnings.warn(f"{name} is no dense reference: {zeros:.0%} of its weights are zero", UserWarning, stacklevel=3)
    return zeros <= MANY_ZEROS


def entries(rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What is stored beside every pruned model of a comparison: its figures, each with that of the dense model.

    names: of the texts. A dense figure counts only if it is of the model's own base, on the very same tokens.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in (row for row in rows if not row.dense):
        for index, (name, result) in enumerate(zip(names, row.results, strict=True)):
            same = (
                {"model": other.model, "value": other.results[index].value}
                for other in rows
                if other.dense and other.model == row.base and other.results[index].text_digest == result.text_digest
            )
            entry = {"text": name, "digest": result.text_digest, "window": result.window, "tokens": result.tokens}
            entry |= {"start_tokens": result.start_tokens, "dtype": result.dtype, "value": result.value}
            found.setdefault(row.model, []).append({**entry, "dense": next(same, None)})
    return found


def _base_of(model: str | Path) -> str | None:
    """The base that a pruned checkpoint names; None for a dense one."""
    checkpoint = Checkpoint(locate(model))
    provenance = checkpoint.config.get("pruning_config")
    if provenance is None:
        return None
    named = provenance.get("base_model", "") if isinstance(provenance, dict) else ""
    return resolved(str(named), checkpoint.folder)


def _own_base(pruned: str, named: Sequence[str], digest_of: Callable[[Path], str], *, warn: bool) -> str | None:
    """The dense model at the end of the chain of bases: one of those that were named, or else a folder that is here.

    digest_of: of the model in a folder, by its path without links.
    """

    def has(model: str, digest: str) -> bool:
        return digest_of(locate(model).resolve()) == digest

    name, seen = pruned, {pruned}
    while (base := _base_of(name)) is not None:
        here = Path(base) if base and base not in seen and os.path.isdir(base) else None
        digest = _stated_digest(name)
        if here is None or _base_of(here) is None:
            there = [other for other in named if other == base or (here is not None and here.samefile(locate(other)))]
            if digest:
                there = [other for other in dict.fromkeys((*there, *named)) if has(other, digest)]
            elif here is None and len(named) == 1:  # nothing says that it is another
                there = named
            if there:
                return there[0]
        fault = ""
        if here is None and base not in named:
            fault = f"{base} is not here" if base else "its name is not recorded"
            fault += "; name it as a MODEL"
        elif here is None or (digest and not has(base, digest)):
            fault = f"{base} is not the model that was pruned; name that one as a MODEL"
        if fault:
            if warn:
                warnings.warn(f"no dense reference for {name}: {fault}", UserWarning, stacklevel=4)
            return None
        seen.add(base)
        name = base
    return name


def _stated_digest(pruned: str) -> str:
    """Digest of the very model that was pruned, as far as the report knows it; nothing if any may be it.

    The digest of a model that was pruned as an object is of another kind, and cannot be compared.
    """
    try:
        report = json.loads((locate(pruned) / "pruning_report.json").read_text(encoding="utf-8"))
        # A later run began with the pruned model; what a later stage of a recipe began with is gone: "" is any digest.
        provenance = Checkpoint(locate(pruned)).config["pruning_config"]
        stated = (provenance.get("base_digest"), report.get("base_digest"), report["fingerprint"].get("model"))
        known = next((found for found in stated if found is not None), "")
        return "" if report.get("result_digest") else str(known)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
