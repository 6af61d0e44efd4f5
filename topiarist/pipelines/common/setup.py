"""What a pipeline starts from: the model as blocks, a pattern for every layer, calibration windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from topiarist import allocate
from topiarist.allocate.fixed import check_budget, read_file
from topiarist.core.errors import CalibrationError, PatternError
from topiarist.core.patterns import Pattern
from topiarist.data import TextFiles, Windows, calibration_windows
from topiarist.models.opened import OpenedModel


def resolve_patterns(
    source: OpenedModel,
    pattern: Pattern,
    allocation: str | Path | Mapping[str, str | None] | None,
    skip: Sequence[str],
    *,
    budgeted: bool = False,
) -> tuple[dict[str, Pattern | None], list[str]]:
    """A pattern for every prunable layer, checked against every shape before any work is done.

    allocation: said layer by layer; with `budgeted` it must keep as many weights as `pattern` everywhere would.
    """
    shapes = source.shapes()
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
    source: OpenedModel,
    calibration: TextFiles | Tensor | Sequence[str],
    tokenizer: Any,
    num_samples: int,
    window: int | None,
    seed: int,
) -> Windows:
    """The calibration windows, by the model's own tokenizer and within its limits."""
    if window is not None and source.limit is not None and window > source.limit:
        raise CalibrationError(f"window {window} is longer than the model's limit of {source.limit} tokens")
    if not isinstance(calibration, Tensor):
        tokenizer = source.tokenizer(tokenizer)
    windows = calibration_windows(
        calibration, tokenizer, num_samples=num_samples, window=window or source.window, seed=seed
    )
    if int(windows.tokens.max()) >= source.vocabulary:
        raise CalibrationError(
            f"calibration token {int(windows.tokens.max())} is outside the model's vocabulary of {source.vocabulary}: "
            "is this the model's own tokenizer?"
        )
    return windows
