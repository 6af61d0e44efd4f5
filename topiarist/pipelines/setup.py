"""What a pipeline starts from: the model as blocks, a pattern for every layer, calibration windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topiarist import allocate
from topiarist.data import TextFiles, Windows, calibration_windows, load_tokenizer
from topiarist.errors import CalibrationError, CheckpointError, TopiaristError
from topiarist.models import block_names
from topiarist.patterns import Pattern
from topiarist.solvers import SOLVERS, Solver
from topiarist.sources import LoadedModel, StreamedModel, block_matrices
from topiarist.store import Checkpoint, locate


def resolve_method(method: str | Solver) -> Solver:
    """A solver by its name in SOLVERS, or the solver itself."""
    if isinstance(method, Solver):
        return method
    if method not in SOLVERS:
        raise TopiaristError(f"unknown method {method!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[method]()


def method_name(solver: Solver) -> str:
    return next((name for name, cls in SOLVERS.items() if type(solver) is cls), type(solver).__name__)


def open_source(
    model: str | Path | nn.Module,
    out: str | Path | None,
    device: str | torch.device | None,
    trust_remote_code: bool,
    *,
    planning: bool = False,
) -> tuple[Any, Checkpoint | None, str]:
    """The model as a source of blocks, its checkpoint if it is on disk, its name."""
    if isinstance(model, nn.Module):
        if out is not None and Path(out).exists():
            raise CheckpointError(f"{out} exists; choose another output for a model that is in memory")
        name = str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
        return LoadedModel(model), None, name
    if out is None and not planning:
        raise CheckpointError("pruning a checkpoint needs an output folder")
    checkpoint = Checkpoint(locate(model))
    if out is not None and Path(out).resolve() == checkpoint.folder.resolve():
        raise CheckpointError(f"{out} is the model itself; choose another output folder")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return StreamedModel(checkpoint, device=where, trust_remote_code=trust_remote_code), checkpoint, str(model)


def resolve_patterns(
    source: Any,
    pattern: Pattern,
    allocation: str | Path | Mapping[str, str | None] | None,
    skip: Sequence[str],
) -> tuple[dict[str, Pattern | None], list[str]]:
    """A pattern for every prunable layer, checked against every shape before any work is done."""
    names = block_names(source.model, source.family)
    shapes = {f"{name}.{m.name}": m.shape for i, name in enumerate(names) for m in block_matrices(source, i)}
    if isinstance(allocation, Mapping):
        patterns = allocate.given(shapes, allocation)
    elif allocation is not None:
        patterns = allocate.from_file(shapes, allocation)
    else:
        dense, unmatched = allocate.without(dict.fromkeys(shapes, pattern), skip)
        fitting = allocate.uniform({n: shapes[n] for n, p in dense.items() if p is not None}, pattern)
        return {name: fitting.get(name) for name in shapes}, unmatched
    return allocate.without(patterns, skip)


def read_windows(
    source: Any,
    checkpoint: Checkpoint | None,
    calibration: TextFiles | Tensor | Sequence[str],
    tokenizer: Any,
    num_samples: int,
    window: int | None,
    seed: int,
) -> Windows:
    """The calibration windows, by the model's own tokenizer and within its limits."""
    config = source.model.config
    limit = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)
    if window is not None and window > limit:
        raise CalibrationError(f"window {window} is longer than the model's limit of {limit} tokens")
    if tokenizer is None and not isinstance(calibration, Tensor):
        tokenizer = load_tokenizer(checkpoint.folder if checkpoint else config.name_or_path)
    windows = calibration_windows(
        calibration, tokenizer, num_samples=num_samples, window=window or min(2048, limit), seed=seed
    )
    if int(windows.tokens.max()) >= config.vocab_size:
        raise CalibrationError(
            f"calibration token {int(windows.tokens.max())} is outside the model's vocabulary of {config.vocab_size}: "
            "is this the model's own tokenizer?"
        )
    return windows
