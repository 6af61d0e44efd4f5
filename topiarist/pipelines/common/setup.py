"""What a pipeline starts from: the model as blocks, a pattern for every layer, calibration windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topiarist import allocate
from topiarist.allocate.fixed import check_budget, read_file
from topiarist.checkpoints.reading import Checkpoint, locate
from topiarist.core.errors import CalibrationError, CheckpointError, PatternError
from topiarist.core.patterns import Pattern
from topiarist.data.text import TextFiles, Windows, calibration_windows, load_tokenizer
from topiarist.models.families import block_names
from topiarist.models.sources import LoadedModel, Source, StreamedModel, block_matrices, device_or_default


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
        return LoadedModel(model), None, object_name(model)
    checkpoint = open_checkpoint(model, out, planning=planning)
    return (
        StreamedModel(checkpoint, device=device_or_default(device), trust_remote_code=trust_remote_code),
        checkpoint,
        str(model),
    )


def object_name(model: nn.Module) -> str:
    """What a model object says it is."""
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)


def open_checkpoint(model: str | Path, out: str | Path | None, *, planning: bool = False) -> Checkpoint:
    """The model on disk. Raises CheckpointError without an output folder beside it, unless nothing is written."""
    if out is None and not planning:
        raise CheckpointError("a checkpoint needs an output folder")
    checkpoint = Checkpoint(locate(model))
    if out is not None and Path(out).resolve() == checkpoint.folder.resolve():
        raise CheckpointError(f"{out} is the model itself; choose another output folder")
    return checkpoint


def layer_shapes(source: Source) -> dict[str, tuple[int, int]]:
    """(out, in) of every prunable matrix by its full name, in order."""
    names = block_names(source.model, source.family)
    return {f"{name}.{m.name}": m.shape for i, name in enumerate(names) for m in block_matrices(source, i)}


def resolve_patterns(
    source: Source,
    pattern: Pattern,
    allocation: str | Path | Mapping[str, str | None] | None,
    skip: Sequence[str],
    *,
    budgeted: bool = False,
) -> tuple[dict[str, Pattern | None], list[str]]:
    """A pattern for every prunable layer, checked against every shape before any work is done.

    allocation: said layer by layer; with `budgeted` it must keep as many weights as `pattern` everywhere would.
    """
    shapes = layer_shapes(source)
    if allocation is None:
        dense, unmatched = allocate.without(dict.fromkeys(shapes, pattern), skip)
        fitting = allocate.uniform({n: shapes[n] for n, p in dense.items() if p is not None}, pattern)
        return {name: fitting.get(name) for name in shapes}, unmatched
    if isinstance(allocation, Mapping):
        patterns, uncounted, what = allocate.given(shapes, allocation), [], "the allocation"
    else:
        if not Path(allocation).is_file():
            raise PatternError(
                f"allocation {str(allocation)!r} is neither a file nor a rule; rules are {', '.join(allocate.ALLOCATIONS)}"
            )
        patterns, uncounted = read_file(shapes, allocation)
        what = f"allocation {allocation}"
    if budgeted:
        counted, _ = allocate.without(dict.fromkeys(sorted(set(shapes) - set(uncounted)), pattern), skip)
        check_budget({n: shapes[n] for n in shapes if counted.get(n) is not None}, patterns, pattern, what)
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
