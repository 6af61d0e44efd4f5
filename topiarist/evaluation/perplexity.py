"""Perplexity on stated text, and an audit of the zeros in a checkpoint's files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topiarist.checkpoints.reading import Checkpoint, locate
from topiarist.core.errors import CalibrationError, NumericalError, PatternError
from topiarist.core.losses import next_token_losses
from topiarist.core.patterns import parse_pattern
from topiarist.data import MAX_SHARED, TextFiles, Windows, evaluation_windows, load_tokenizer
from topiarist.models.checks import device_or_default
from topiarist.models.folder import FolderModel
from topiarist.models.opened import open_model


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean next-token loss inside windows without overlap, with all that is needed to repeat it."""

    value: float
    window: int
    tokens: int
    text_digest: str
    dtype: str


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Windows | Tensor,
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a loaded causal LM on token windows (num, window): every window predicts its tokens 1..end.

    Raises NumericalError if the loss is not finite.
    """
    tokens = windows.tokens if isinstance(windows, Windows) else windows
    device = next(model.parameters()).device
    total, predicted = 0.0, 0
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size].to(device)
        losses = next_token_losses(model(input_ids=batch, use_cache=False).logits, batch)
        total += float(losses.double().sum())
        predicted += losses.numel()
        if progress is not None:
            progress(min(start + batch_size, len(tokens)), len(tokens))
    mean = total / predicted
    if not math.isfinite(mean):
        raise NumericalError("the model's loss is not finite on this text")
    digest = windows.digest if isinstance(windows, Windows) else ""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, tokens.shape[1], predicted, digest, dtype)


def load_model(folder: str | Path, *, device: str | torch.device = "cpu", trust_remote_code: bool = False) -> Any:
    """A checkpoint through plain transformers, in its own dtype, ready to run. Raises as `open_model` does."""
    return open_model(folder, device=device, trust_remote_code=trust_remote_code).whole().model


def held_out_windows(
    folder: str | Path, text: TextFiles, *, window: int, max_windows: int | None = None, allow_overlap: bool = False
) -> Windows:
    """Evaluation windows for a checkpoint, by its own tokenizer.

    Raises CalibrationError if the checkpoint was pruned on that very text (its calibration is written beside it).
    """
    path = locate(folder)
    record = path / "pruning_calibration.json"
    known: frozenset[int] = frozenset()
    if record.is_file():
        known = frozenset(int(h, 16) for h in json.loads(record.read_text(encoding="utf-8")).get("passages", []))
    windows = evaluation_windows(text, load_tokenizer(path), window=window, max_windows=max_windows, calibration=known)
    if windows.overlap > MAX_SHARED and not allow_overlap:
        names = ", ".join(str(p) for p in text.paths)
        raise CalibrationError(
            f"{windows.overlap:.0%} of {names} is calibration text of {folder}: the result would flatter it; evaluate on "
            "other text"
        )
    return windows


@dataclass(frozen=True)
class MatrixAudit:
    """What the files say about one matrix."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    pattern: str | None
    """The pattern the checkpoint claims, or else an N:M pattern that its zeros happen to keep."""
    holds: bool | None
    """Whether the zeros are at least those of a claimed pattern; None without a claim."""


def audit(folder: str | Path) -> tuple[dict[str, Any], list[MatrixAudit]]:
    """The `pruning_config` of a checkpoint and every prunable matrix of its files, held against what it claims."""
    checkpoint = Checkpoint(locate(folder))
    source = FolderModel(checkpoint, device=torch.device("cpu"))
    provenance = checkpoint.config.get("pruning_config", {})
    claims = checkpoint.claims()
    audits = []
    for index, path in enumerate(source.block_names):
        source.load(index)
        for matrix in source.matrices(index):
            name, mask = f"{path}.{matrix.name}", matrix.weight != 0
            sparsity = 1.0 - float(mask.double().mean())
            claim = claims.get(name)
            holds = None if claim is None else _holds(mask, claim)
            audits.append(MatrixAudit(name, matrix.shape, sparsity, claim or _kept_pattern(mask, sparsity), holds))
        source.release(index)
    return provenance, audits


def _holds(mask: Tensor, claim: str) -> bool:
    try:
        return parse_pattern(claim).holds(mask)
    except PatternError:
        return False


def _kept_pattern(mask: Tensor, sparsity: float) -> str | None:
    """The strictest common N:M pattern that an unclaimed matrix keeps."""
    return next((p for p in ("1:4", "2:4", "4:8", "8:16") if sparsity > 0.4 and _holds(mask, p)), None)


@dataclass(frozen=True)
class Row:
    """Perplexities of one model, one for every text."""

    model: str
    dense: bool
    results: list[Perplexity]


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
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Row]:
    """Perplexity of every model on every text, dense models first.

    With `reference`, the base of a pruned model joins if it can be found and no dense model was named. All windows are
    made, and refused, before any model is loaded.
    """
    named = with_reference(models, reference)
    prepared = {
        name: [
            held_out_windows(name, text, window=window, max_windows=max_windows, allow_overlap=allow_overlap)
            for text in texts
        ]
        for name, _ in named
    }
    where = device_or_default(device)
    rows = []
    for name, dense in named:
        model = load_model(name, device=where, trust_remote_code=trust_remote_code)
        label = Path(name).name
        results = [
            perplexity(model, w, batch_size=batch_size, progress=lambda done, total, n=label: progress(n, done, total))
            for w in prepared[name]
        ]
        rows.append(Row(name, dense, results))
        del model
    return rows


def with_reference(models: Sequence[str], reference: bool = True) -> list[tuple[str, bool]]:
    """(model, whether it is dense), dense ones first.

    With `reference`, the base of a pruned model joins if it can be found and no dense model is named.
    """
    bases = {str(name): _base_of(name) for name in models}
    names = [str(name) for name in models]
    if reference and all(bases.values()):
        found = [base for base in dict.fromkeys(bases.values()) if base and Path(base).is_dir()]
        names = found[:1] + names
        bases.update(dict.fromkeys(found[:1]))
    return sorted(((name, bases[name] is None) for name in names), key=lambda named: not named[1])


def entries(rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What is stored beside every pruned model of a comparison: its figures, each with that of the dense model.

    names: of the texts. A dense figure counts only if it was measured on the very same tokens.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in (row for row in rows if not row.dense):
        for index, (name, result) in enumerate(zip(names, row.results, strict=True)):
            same = (
                {"model": other.model, "value": other.results[index].value}
                for other in rows
                if other.dense and other.results[index].text_digest == result.text_digest
            )
            entry = {"text": name, "digest": result.text_digest, "window": result.window, "tokens": result.tokens}
            entry |= {"dtype": result.dtype, "value": result.value, "dense": next(same, None)}
            found.setdefault(row.model, []).append(entry)
    return found


def _base_of(model: str | Path) -> str | None:
    """The base that a pruned checkpoint names; None for a dense one."""
    config = Checkpoint(locate(model)).config
    return config["pruning_config"].get("base_model", "") if "pruning_config" in config else None
